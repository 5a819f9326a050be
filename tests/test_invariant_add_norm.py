"""The residual add and the norm after it, in place, beside the two operators one by one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxpass

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def llama(h, weight, eps, x):
    """Hugging Face's order; `h` is the sum, the result has x's dtype."""
    normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x) if weight is None else weight * normed.to(x)


def gemma(h, weight, eps, x):
    normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x)


def torch_s(h, weight, eps, x):
    return torch.nn.functional.rms_norm(h.float(), h.shape[-1:], weight.float(), eps).to(x)


ORDERS = {
    "llama": (llama, {}),
    "gemma": (gemma, {"rounding": "scale_then_cast", "weight_offset": 1.0}),
    "torch": (torch_s, {"rounding": "scale_then_cast"}),
}


def given(shape, x=BF16, residual=BF16, device="cpu"):
    """x, residual and weight."""
    made = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=made) for s in (shape, shape, shape[-1:])]
    return [t.to(device, d) for t, d in zip(tensors, (x, residual, x), strict=True)]


def check(shape, order, x=BF16, residual=BF16, device="cpu"):
    """Values, bits beside the operators in the mode, and that memory stays where it was."""
    meaning, named = ORDERS[order]
    h, r, weight = given(shape, x, residual, device)
    with torch.no_grad(), fxpass.batch_invariant_mode():
        total = h + r
        wanted = meaning(total, weight, 1e-6, x)
    at = h.data_ptr(), r.data_ptr()
    made = fxpass.add_rms_norm_(h, r, weight, 1e-6, **named)
    assert made[0] is h
    assert made[1] is r
    assert (h.data_ptr(), r.data_ptr()) == at
    assert torch.equal(r, total)
    assert torch.equal(h, wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)], ids=str)
def test_bits_are_those_of_the_two_operators(order, dtypes):
    for shape in ((1, 8), (7, 64), (2, 3, 1000)):
        check(shape, order, *dtypes)


def test_strided_inputs_are_written_in_place():
    h, r, weight = given((6, 64))
    wide = torch.zeros(6, 200, dtype=BF16)
    view, turned = wide[:, 8:72], torch.zeros(64, 6, dtype=BF16).t()
    view.copy_(h)
    turned.copy_(r)
    fxpass.add_rms_norm_(view, turned, weight, 1e-6)
    fxpass.add_rms_norm_(h, r, weight, 1e-6)
    assert torch.equal(view, h)
    assert torch.equal(turned, r)
    assert not wide[:, :8].any()
    assert not wide[:, 72:].any()


def test_no_weight_and_no_eps_and_no_rows():
    h, r, _ = given((5, 32))
    wanted = llama(h + r, None, torch.finfo(F32).eps, BF16)
    assert torch.equal(fxpass.add_rms_norm_(h, r)[0], wanted)
    none = torch.zeros(0, 32, dtype=BF16)
    assert fxpass.add_rms_norm_(none, none.clone())[0].shape == (0, 32)


def test_a_row_keeps_its_bits_in_every_batch():
    h, r, weight = given((64, 512))
    whole = fxpass.add_rms_norm_(h.clone(), r.clone(), weight, 1e-6)
    for row in (0, 31, 63):
        alone = fxpass.add_rms_norm_(
            h[row : row + 1].clone(), r[row : row + 1].clone(), weight, 1e-6
        )
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(backend):
    def step(h, r, weight):
        out, total = fxpass.add_rms_norm_(h, r, weight, 1e-6)
        return out * 2, total

    h, r, weight = given((4, 64))
    eager, compiled = [h.clone(), r.clone()], [h.clone(), r.clone()]
    wanted = step(*eager, weight)
    torch.compiler.reset()
    found = torch.compile(step, backend=backend, fullgraph=True)(*compiled, weight)
    assert all(
        torch.equal(a, b) for a, b in zip((*found, *compiled), (*wanted, *eager), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"residual": torch.zeros(3, 8)}, r"residual is \(3, 8\) on cpu, needs x's \(2, 8\)"),
        ({"residual": torch.zeros(2, 8).half()}, "residual is torch.float16, needs torch.float32"),
        ({"weight": torch.zeros(4)}, r"weight is \(4,\) on cpu, needs \(8,\) on cpu"),
        ({"weight": torch.zeros(8).half()}, "weight is torch.float16, needs torch.float32 for"),
        ({"rounding": "source"}, "rounding 'source', needs one of"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, "requires a gradient"),
        ({"x": torch.zeros(2, 8).double(), "residual": torch.zeros(2, 8).double()}, "float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_in_one_line(change, text):
    named = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8), **change}
    kept = {name: v.clone() for name, v in named.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(fxpass.FxpassError, match=text) as error:
        fxpass.add_rms_norm_(**named)
    assert "\n" not in str(error.value)
    assert all(torch.equal(named[name], value) for name, value in kept.items())


def test_memory_that_cannot_be_written_alone_is_refused():
    memory, other = torch.ones(4, 8), torch.ones(2, 8)
    with torch.inference_mode():
        inference = torch.ones(2, 8)
    for x, residual, weight, text in (
        (memory[:2], memory[1:3], None, "x, residual share memory"),
        (memory[:2], other, memory[3], "x, residual, weight share memory"),
        (other, torch.ones(1, 8).expand(2, 8), None, "residual is expanded"),
        (torch.ones(1, 8).expand(2, 8), other, None, "x is expanded"),
        (torch._neg_view(torch.ones(2, 8)), other, None, "x has a negation that waits"),
        (other, inference, None, "residual is an inference tensor"),
        (other.to_sparse(), other, None, "x is torch.sparse_coo on cpu"),
    ):
        with pytest.raises(fxpass.FxpassError, match=text):
            fxpass.add_rms_norm_(x, residual, weight)
        assert torch.equal(memory, torch.ones(4, 8))
        assert torch.equal(other, torch.ones(2, 8))


def test_who_watches_operators_sees_one():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen, tensors = [], given((2, 8))
    with Watch():
        fxpass.add_rms_norm_(*tensors)
    assert seen == ["fxpass.add_norm_.default"]
    with FakeTensorMode():
        x = fxpass.add_rms_norm_(torch.ones(2, 8), torch.ones(2, 8))[0]
    assert x.shape == (2, 8)
    meta = torch.ones(2, 8, device="meta")
    assert fxpass.add_rms_norm_(meta, torch.ones(2, 8, device="meta"))[0] is meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hidden", [8, 100, 4096, 8192, 16_384, 65_536])
def test_on_a_gpu(order, hidden):
    for rows in (1, 5, 300):
        for dtypes in ((BF16, BF16), (F32, F32), (BF16, F32)):
            check((rows, hidden), order, *dtypes, device="cuda")
