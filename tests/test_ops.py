"""The operators of rewritten graphs: gradients of gradients, strides, what replaces a kernel."""

from __future__ import annotations

import warnings

import pytest
import torch
from kernel_cases import LLAMA, SPECS

from fxpass import ops
from fxpass.kernels import by_name, cpu, cuda_build, cuda_call, cuda_row, reference, triton_row
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.spec import NormSpec

EPS = 1e-6
F32 = (
    "x=f32 residual=f32 sum=f32 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,mul_weight:f32 weight=f32 outputs=out,sum"
)


def eager(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + residual
    return w * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)), total


def ours(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.fxpass.norm2(x, residual, w, None, None, EPS, "reference.eager", F32)


RESIDUALS = {
    "its own": lambda x, r: (x, r),
    "what x was made from": lambda x, r: (r.sin(), r),
    "x itself": lambda x, r: (r, r),
    "without a gradient": lambda x, r: (x, r.detach()),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_gradients_have_gradients(name: str) -> None:
    """A gradient penalty, where something else in the graph is differentiable as well."""

    def penalty(norm) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        leaves = [torch.randn(size, requires_grad=True) for size in ((3, 8), (3, 8), (8,))]
        x, residual = RESIDUALS[name](*leaves[:2])
        out, total = norm(x, residual, leaves[2])
        loss = (out + leaves[1] ** 3).square().sum() + total.exp().sum()
        (gradient,) = torch.autograd.grad(loss, leaves[1], create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True))

    wanted, found = penalty(eager), penalty(ours)
    assert sum(one is not None for one in wanted) >= 2
    for a, b in zip(wanted, found, strict=True):
        # The same formulas; terms are added in another order.
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_first_gradients_keep_no_graph() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    out, _ = ours(x, torch.zeros(3, 8), torch.ones(8))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not gradient.requires_grad


@pytest.mark.parametrize("kernel", ["reference.eager", "inductor.fused", "cpu.row"])
def test_all_outputs_are_contiguous_for_every_input(kernel: str) -> None:
    x, residual = (torch.randn(4, 6, 64).bfloat16().transpose(0, 1) for _ in range(2))
    spec = SPECS["residual"].partition(" outputs")[0] + " outputs=out,sum,row"
    weight = torch.rand(64).bfloat16()
    arguments = (x, residual, weight, None, None, EPS, kernel, spec)
    made = torch.ops.fxpass.norm3(*arguments)
    assert [t.stride() for t in made] == [t.stride() for t in ops.fake(*arguments)]
    assert all(t.is_contiguous() for t in made)


# ---- A graph that comes to a machine on which its kernel cannot be built ------------------------


@pytest.fixture
def cannot(monkeypatch):
    """The GPU kernels are called, with nothing to build them."""
    fresh = ops._Calls()
    monkeypatch.setattr(ops, "calls", fresh)

    def no(*_):
        raise BuildError("no NVRTC library")

    monkeypatch.setattr(cuda_row, "_kernels", Once())
    monkeypatch.setattr(cuda_build, "cubin", no)
    monkeypatch.setattr(cuda_call, "check", lambda *_: None)
    monkeypatch.setattr(cuda_row, "is_current", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton_row, "_no_triton", lambda: "triton is not installed")
    return fresh


@pytest.mark.parametrize(
    ("kernel", "why"),
    [("cuda.row", "no NVRTC library"), ("triton.row", "triton is not installed")],
)
def test_the_reference_runs_instead_with_one_warning(cannot, kernel: str, why: str) -> None:
    x, w = torch.randn(2, 64).bfloat16(), torch.rand(64).bfloat16()
    (wanted,) = reference.launch(NormSpec.parse(LLAMA), x, None, w, None, EPS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for rows in (2, 1, 0):
            made = cannot[f"{kernel} {LLAMA}"](x[:rows], None, w, None, EPS)
            assert torch.equal(made, wanted[:rows])
    (warning,) = seen
    assert f"fxpass: {kernel} cannot run here ({why})" in str(warning.message)


@pytest.mark.usefixtures("cannot")
def test_a_kernel_that_writes_in_place_is_not_replaced() -> None:
    """Its callers were promised rows that are invariant, which the reference's are not."""
    spec = NormSpec.parse(F32)
    x, residual = torch.randn(2, 2, 64)
    with pytest.raises(BuildError, match="no NVRTC library"):
        by_name("cuda.row").overwriting(spec)(x, residual, torch.rand(64), None, EPS)


def test_autograd_sees_what_is_written_in_place(monkeypatch) -> None:
    """Kernels write through addresses; a tensor kept for backward must not pass as unchanged."""

    def over(spec: NormSpec):
        return lambda x, residual, *rest: None

    kernel = cpu.KERNEL.__class__("testing.over", cpu.CONTRACT, cpu.launch, over=over)
    x, residual, w = torch.randn(2, 8), torch.randn(2, 8), torch.rand(8, requires_grad=True)
    loss = (x * w).sum() + (residual * w).sum()
    kernel.overwriting(NormSpec.parse(F32))(x, residual, w.detach(), None, EPS)
    assert (x._version, residual._version) == (1, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kernel.overwriting(NormSpec.parse(F32))(x + 1, residual + 1, w, None, EPS)
