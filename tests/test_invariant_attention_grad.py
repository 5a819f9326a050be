"""Gradients of attention in the mode: right, of first and second order, and of each row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxpass
from fxpass.invariant import attention_grad
from fxpass.invariant.recorder import Recorder


def tensors(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(size: int, masked: bool) -> None:
    inputs = tensors(*[(1, 2, 5, size)] * 3)
    mask = tensors((5, 5))[0] if masked else None
    wanted_of = inputs if mask is None else [*inputs, mask]

    def second():
        out = F.scaled_dot_product_attention(*inputs, mask, is_causal=not masked)
        first = torch.autograd.grad(out.sin().sum(), wanted_of, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.cos().sum() for g in first), inputs)

    with sdpa_kernel(SDPBackend.MATH):
        wanted = second()
    with fxpass.batch_invariant_mode():
        found = second()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transforms_are_torchs() -> None:
    """Of an operator of a library, forward-mode derivatives would be lost without a word."""
    q, k, v = (t.detach() for t in tensors(*[(1, 2, 5, 8)] * 3, dtype=torch.float32))

    def attend(q):
        return F.scaled_dot_product_attention(q, k, v).sin().sum()

    wanted = torch.func.grad(attend)(q)
    x = torch.rand(3, 8)
    _, tangent = torch.func.jvp(lambda x: F.rms_norm(x, (8,)), (x,), (x.cos(),))
    with fxpass.batch_invariant_mode(), forward_ad.dual_level():
        torch.testing.assert_close(torch.func.grad(attend)(q), wanted)
        with pytest.raises(NotImplementedError, match="forward AD"):
            attend(forward_ad.make_dual(q, q))
        found = forward_ad.unpack_dual(F.rms_norm(forward_ad.make_dual(x, x.cos()), (8,)))
    torch.testing.assert_close(found.tangent, tangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scratch", [1 << 24, 40 * 40 * 2, 1])
def test_gradients_of_a_row_alone(dtype: torch.dtype, scratch: int, monkeypatch) -> None:
    monkeypatch.setattr(attention_grad, "_SCRATCH", scratch)
    q, k, v, grad = (t.detach() for t in tensors(*[(5, 3, 40, 16)] * 4, dtype=dtype))
    mask = torch.rand(5, 1, 40, 40) > 0.3

    def gradients(rows, masked=True):
        inputs = [t[rows].clone().requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(
            *inputs, mask[rows] if masked else None, is_causal=not masked
        )
        return torch.autograd.grad(out, inputs, grad[rows])

    with fxpass.batch_invariant_mode(), Recorder() as found:
        whole = gradients(slice(None)), gradients(slice(None), masked=False)
        for rows in (slice(0, 1), slice(3, 5)):
            for masked in (True, False):
                for some, every in zip(gradients(rows, masked), whole[not masked], strict=True):
                    assert torch.equal(some, every[rows])
    assert not found.unknown
    for ours, theirs in zip(whole[0], gradients(slice(None)), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradients_lie_in_memory_as_torchs() -> None:
    """Graphs that were compiled without the mode assert the strides."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = [torch.rand(2, 3, 5, 8) for _ in range(5)] + [torch.rand(2, 3, 5), 0.0, True]
    wanted = [t.stride() for t in op(*given)]
    with fxpass.batch_invariant_mode():
        assert [t.stride() for t in op(*given)] == wanted
