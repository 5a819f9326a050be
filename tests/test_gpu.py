"""On an NVIDIA GPU: what the pass does by itself, and the reference by name with eager's bits."""

from __future__ import annotations

import pytest
import torch

import fxpass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class LlamaRMSNorm(torch.nn.Module):
    """As Hugging Face writes it, after a residual add."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(hidden, dtype=torch.bfloat16) + 0.5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        h = total.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype), total


@pytest.fixture
def model() -> LlamaRMSNorm:
    torch.manual_seed(0)
    torch.compiler.reset()
    fxpass.reset_report()
    return LlamaRMSNorm(4096).cuda()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    shape = (33, 4096)
    return tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(2))  # type: ignore[return-value]


def flips(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of elements that differ; none by more than the squares' order can move it.

    Another order changes the row value by a few float32 ulps. That flips the rounding before the
    weight or the one after it where a value lies that close to a tie: a bf16 ulp each, 2**-7.
    """
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=0.0)
    return float((found != wanted).float().mean())


def test_auto_rewrites_with_a_row_kernel(model, inputs):
    with torch.no_grad():
        options = {"strict": True, "expect": 1}
        compiled = torch.compile(model, backend=fxpass.rmsnorm_backend, options=options)
        out, total = compiled(*inputs)
        eager_out, eager_total = model(*inputs)
        unpinned = torch.compile(model)(*inputs)[0]
    (site,) = fxpass.last_report().rewritten
    assert site.kernel == "cuda.row"
    assert not fxpass.last_report().declined
    assert torch.equal(total, eager_total)
    # 2**-23 / 2**-9 of the values lie within a float32 ulp of a bf16 tie.
    assert flips(out, eager_out) <= 1e-3
    # The check can fail: without the rounding before the weight a quarter of them moves.
    assert (unpinned != eager_out).float().mean() > 0.1


def test_auto_keeps_a_rounding_inside_a_larger_fusion(model, inputs):
    def gated(x, residual, gate):
        return model(x, residual)[0] * torch.nn.functional.silu(gate)

    gate = torch.randn_like(inputs[0])
    with torch.no_grad():
        options = {"strict": True, "expect": 1, "numerics": "eager"}
        compiled = torch.compile(gated, backend=fxpass.rmsnorm_backend, options=options)
        found, wanted = compiled(*inputs, gate), gated(*inputs, gate)
    (site,) = fxpass.last_report().rewritten
    assert site.kernel == "inductor.fused"
    assert (found != wanted).float().mean() <= 0.01  # and exp of silu is another than eager's


def test_reference_by_name_gives_eager_bits(model, inputs):
    options = {"strict": True, "expect": 1, "providers": ("reference",)}
    with torch.no_grad():
        compiled = torch.compile(model, backend=fxpass.rmsnorm_backend, options=options)
        out, total = compiled(*inputs)
        eager_out, eager_total = model(*inputs)
    assert torch.equal(total, eager_total)
    assert torch.equal(out, eager_out)


def test_verify_runs_on_the_device(model, inputs):
    options = {"strict": True, "expect": 1, "providers": ("reference",), "verify": True}
    with torch.no_grad():
        torch.compile(model, backend=fxpass.rmsnorm_backend, options=options)(*inputs)


def test_gradients_match_eager(model, inputs):
    wanted = [leaf.clone().requires_grad_() for leaf in inputs]
    model(*wanted)[0].float().sum().backward()
    expected = [leaf.grad for leaf in wanted] + [model.weight.grad.clone()]
    model.zero_grad()
    found = [leaf.clone().requires_grad_() for leaf in inputs]
    options = {"strict": True, "expect": 1, "providers": ("reference",)}
    compiled = torch.compile(model, backend=fxpass.rmsnorm_backend, options=options)
    compiled(*found)[0].float().sum().backward()
    for got, want in zip(
        [leaf.grad for leaf in found] + [model.weight.grad], expected, strict=True
    ):
        # Sums of bf16 values in other orders: a few bf16 ulps of the largest gradient.
        assert (got - want).abs().max() <= 0.02 * want.abs().max()
