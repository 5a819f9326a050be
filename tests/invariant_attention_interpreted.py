"""Attention's bits and values, in Triton's interpreter.

test_invariant_attention_triton.py runs this file in a process of its own, because
TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import math

import invariant_attention_cases as cases
import numpy as np
import pytest
import torch
from invariant_attention_cases import FLOATS, SCHEDULES, assert_close, attend, given, meaning, same
from triton_cases import interpreted

from fxpass.kernels.invariant import attention_gpu, attention_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

F32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    from triton.runtime import interpreter

    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _exact_dot)
        yield


def _exact_dot(builder, a, b, total, *_):
    """Summed in float64: what order that has does not show in float32."""
    del builder
    from triton.runtime.interpreter import TensorHandle

    found = _wide(a) @ _wide(b) + total.data
    return TensorHandle(found.astype(np.float32), total.dtype.scalar)


def _wide(handle):
    if handle.dtype.scalar.name != "bf16":
        return handle.data.astype(np.float64)
    # The interpreter keeps bfloat16 as bit patterns.
    return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Two or four blocks in a chunk, so that few keys make several chunks."""
    monkeypatch.setattr(attention_plan, "CHUNK", 128)
    monkeypatch.setattr(attention_gpu, "_plans", {})


@pytest.fixture
def use(monkeypatch):
    def force(name):
        cases.use(monkeypatch, SCHEDULES[name])

    return force


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 2, 5, 70, 16), (1, 2, 2, 33, 40, 40, 24), (1, 4, 1, 1, 150, 64), (1, 1, 1, 3, 9, 1)],
)
def test_close_to_float64(shape, dtype):
    q, k, v = given(*shape, dtype=dtype)
    lq, lk = q.shape[2], k.shape[2]
    masks = {
        "none": (None, False),
        "causal": (None, True),
        "bool": (torch.rand(lq, lk) > 0.3, False),
        "heads": (torch.rand(1, q.shape[1], 1, lk) > 0.3, True),
        "add": (torch.randn(q.shape[0], 1, lq, lk).to(dtype), False),
    }
    for name, (mask, causal) in masks.items():
        found = attend(q, k, v, mask, causal=causal)
        assert_close(found, meaning(q, k, v, mask, causal), dtype), name
    assert_close(attend(q, k, v, scale=-0.3), meaning(q, k, v, scale=-0.3), dtype)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_change_no_bit(name, use):
    for lq, lk, causal in ((1, 300, False), (3, 40, True), (5, 150, False)):
        q, k, v = given(1, 4, 1, lq, lk, 16)
        use("single")
        wanted = attend(q, k, v, causal=causal)
        use(name)
        assert same(attend(q, k, v, causal=causal), wanted)


def test_decode_is_prefill():
    """The last token alone and inside of a causal prefill, at every kind of position."""
    for shared in (1, 4):
        q, k, v = given(1, 4, shared, 70, 70, 16, dtype=torch.bfloat16)
        whole = attend(q, k, v, causal=True)
        for t in (0, 15, 63, 64, 69):
            alone = attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
            assert same(alone, (whole[0][:, :, t : t + 1], whole[1][:, :, t : t + 1])), t


@pytest.mark.parametrize(
    ("name", "bad"), [("single", -math.inf), ("tall", math.nan), ("packed_split", math.inf)]
)
def test_what_is_not_seen_does_not_matter(name, bad, use):
    use(name)
    q, k, v = given(1, 4, 1, 6, 200, 16)
    for causal, seen in ((True, 6), (False, 140)):
        mask = None if causal else (torch.arange(200) < seen)[None]
        wanted = attend(q, k[:, :, :seen], v[:, :, :seen], causal=causal)
        assert same(attend(q, k, v, mask, causal=causal), wanted)
        worse = k.clone(), v.clone()
        worse[0][:, :, seen:], worse[1][:, :, seen:] = bad, bad
        assert same(attend(q, *worse, mask, causal=causal), wanted)
        if mask is not None:
            added = torch.zeros(1, 200).masked_fill(~mask, -math.inf)
            assert same(attend(q, *worse, added), wanted)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_one_row_sees_is_not_what_another_sees(name, use):
    """In a tile with rows that see an infinite value, those that do not keep their bits."""
    use(name)
    q, k, v = given(1, 4, 1, 8, 140, 16)
    wanted = attend(q, k, v, causal=True)
    v[0, 0, 3, 0], v[0, 0, 4, 1], v[0, 0, 5, 1] = math.nan, math.inf, -math.inf
    out, lse = attend(q, k, v, causal=True)
    assert torch.equal(lse, wanted[1])
    expected = wanted[0].clone()
    expected[:, :, 3:, 0] = math.nan
    expected[:, :, 4, 1] = math.inf
    expected[:, :, 5:, 1] = math.nan
    assert same((out,), (expected,))


def test_neighbours_do_not_matter():
    q, k, v = given(3, 4, 2, 20, 40, 16)
    wanted = attend(q, k, v, causal=True)
    for t in (q, k, v):
        t[[0, 2]] = math.nan
        t[1, :, 19] = math.inf
    found = attend(q, k, v, causal=True)
    assert same([t[1:2, :, :19] for t in found], [t[1:2, :, :19] for t in wanted])
    assert same([t[:, :, :19] for t in attend(q[1:2], k[1:2], v[1:2], causal=True)],
                [t[1:2, :, :19] for t in wanted])  # fmt: skip


def test_rows_that_see_nothing():
    q, k, v = given(1, 2, 1, 4, 70, 16)
    mask = torch.ones(4, 70, dtype=torch.bool)
    mask[1] = False
    for told in (mask, torch.zeros(4, 70).masked_fill(~mask, -math.inf)):
        out, lse = attend(q, k, v, told)
        assert_close((out, lse), meaning(q, k, v, told), F32)
        assert not out[:, :, 1].any()
        assert not lse[:, :, 1].any()
    out, lse = attend(q, k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert not lse.any()


def test_finite_masks():
    """A mask of 0 changes no bit; one of the least float32 everywhere weighs all keys alike."""
    q, k, v = given(1, 2, 1, 4, 130, 16)
    least = torch.finfo(F32).min
    wanted = attend(q, k, v)
    assert same(attend(q, k, v, torch.zeros(4, 1)), wanted)
    padded = torch.zeros(130)
    padded[100:] = least
    assert same(attend(q, k, v, padded), attend(q, k[:, :, :100], v[:, :, :100]))
    out = attend(q, k, v, torch.full((130,), least))[0]
    mean = v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean)


def test_strides():
    q, k, v = given(2, 4, 2, 5, 50, 16)
    wanted = attend(q, k, v)
    for view in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert same(attend(view(q), view(k), view(v)), wanted)
    assert wanted[0].transpose(1, 2).is_contiguous()
    mask = torch.rand(50, 5) > 0.5
    assert same(attend(q, k, v, mask.t()), attend(q, k, v, mask.t().contiguous()))
    shared = k[:1].expand_as(k)
    assert same(attend(q, shared, shared), attend(q, shared.contiguous(), shared.contiguous()))


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 5, 8), (1, 2, 1, 0, 5, 8), (2, 2, 1, 3, 0, 8)])
def test_empty(shape):
    q, k, v = given(*shape)
    out, lse = attend(q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not out.any()


def test_what_is_refused():
    q, k, v = given(1, 4, 2, 3, 5, 16)
    for kind, text, arguments in (
        (TypeError, r"attention of torch\.float64", (q.double(), k.double(), v.double())),
        (TypeError, r"v is torch\.bfloat16", (q, k, v.bfloat16())),
        (ValueError, "4 heads of q, needs a multiple of k's 3", (q, *given(1, 3, 3, 3, 5, 16)[1:])),
        (ValueError, "differ in the first or the last", (q, *given(1, 4, 2, 3, 5, 8)[1:])),
        (ValueError, r"needs \(B, H, L, D\)", (q, k, v[:, :, 1:])),
        (ValueError, "heads of 300", given(1, 1, 1, 3, 5, 300)),
        (TypeError, r"mask is torch\.int64", (q, k, v, torch.zeros(3, 5).long())),
    ):
        with pytest.raises(kind, match=text):
            attend(*arguments)
