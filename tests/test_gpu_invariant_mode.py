"""The mode on a GPU: the operators reached, their gradients, and compiled against eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxpass

pytestmark = pytest.mark.gpu

BATCHES = (1, 2, 3, 7, 33)


def model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(0)
    return Block().to("cuda", dtype)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = torch.nn.RMSNorm(256), torch.nn.LayerNorm(256)
        self.qkv = torch.nn.Linear(256, 768)
        self.out = torch.nn.Linear(256, 1000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, 4, 64).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
        y = self.after(x + y.transpose(1, 2).reshape(x.shape))
        y = y * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(y.dtype)
        return F.log_softmax(self.out(y), -1)


def run(call, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return call(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_eager_mode(dtype: torch.dtype) -> None:
    net, x = model(dtype), torch.randn(64, 19, 256, device="cuda", dtype=dtype)
    with fxpass.batch_invariant_mode():
        whole = run(net, x)
        for rows in BATCHES:
            assert torch.equal(run(net, x[5 : 5 + rows]), whole[5 : 5 + rows])
    torch.testing.assert_close(whole, run(net, x), rtol=5e-2, atol=5e-2)


def test_compiled_rows_and_eager_bits() -> None:
    net, x = model(), torch.randn(40, 19, 256, device="cuda", dtype=torch.bfloat16)
    options = {"batch_invariant": True, "strict": True}
    compiled = torch.compile(net, backend=fxpass.rmsnorm_backend, options=options)
    whole = run(compiled, x)
    for rows in BATCHES[:3]:
        assert torch.equal(run(compiled, x[5 : 5 + rows]), whole[5 : 5 + rows])
    with fxpass.batch_invariant_mode():
        assert torch.equal(run(net, x), whole)


def test_gradients_are_close_to_torchs() -> None:
    net, x = model(torch.float32), torch.randn(3, 19, 256, device="cuda", requires_grad=True)
    wanted = torch.autograd.grad(net(x)[..., 3].sum(), [x, *net.parameters()])
    with fxpass.batch_invariant_mode():
        found = torch.autograd.grad(net(x)[..., 3].sum(), [x, *net.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_each_backend_of_attention_has_a_gradient(backend: str) -> None:
    kind = getattr(torch.nn.attention.SDPBackend, backend)
    inputs = torch.randn(3, 2, 4, 33, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = inputs.requires_grad_().unbind()
    op = {
        "FLASH_ATTENTION": lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v),
        "EFFICIENT_ATTENTION": lambda: torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True
        ),
    }[backend]
    with torch.nn.attention.sdpa_kernel(kind):
        wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), inputs)[0]
    with fxpass.batch_invariant_mode():
        found = torch.autograd.grad(op()[0].sum(), inputs)[0]
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)


def test_products_with_an_output_dtype() -> None:
    a, b = torch.randn(2, 128, 128, device="cuda", dtype=torch.bfloat16).unbind()
    with fxpass.batch_invariant_mode():
        wide = torch.mm(a, b, out_dtype=torch.float32)
    torch.testing.assert_close(wide, a.float() @ b.float(), rtol=1e-4, atol=1e-3)
    assert not torch.equal(wide, wide.bfloat16().float()), "rounded through 16 bits"


def test_rms_norm_uses_float32_epsilon() -> None:
    x = torch.randn(4, 2, 128, device="cuda", dtype=torch.bfloat16) * 1e-2
    wanted = F.rms_norm(x, (2, 128))
    with fxpass.batch_invariant_mode():
        torch.testing.assert_close(F.rms_norm(x, (2, 128)), wanted)
        fused = torch.ops.aten._fused_rms_norm(x, [2, 128], None, None)
    torch.testing.assert_close(fused[0], wanted)
    assert fused[1].shape == (4, 1, 1)
