"""On an NVIDIA GPU: nothing breaks where no kernel fits, and the reference keeps eager's bits."""

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


def test_without_a_kernel_every_norm_is_declined_and_the_model_runs(model, inputs):
    with torch.no_grad():
        compiled = torch.compile(model, backend=fxpass.rmsnorm_backend, options={"strict": True})
        out, total = compiled(*inputs)
        eager_out, eager_total = model(*inputs)
    report = fxpass.last_report()
    assert not report.rewritten
    assert ["no kernel" in miss.reason for miss in report.declined] == [True]
    assert torch.equal(total, eager_total)
    torch.testing.assert_close(out, eager_out)


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
