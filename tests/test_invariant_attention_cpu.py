"""CPU attention: decode and prefill, padding that holds anything, and torch's meaning."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invariant_cpu_cases import DTYPES, drawn, each_dtype, layouts, same, threads, without_library
from torch.nn.functional import scaled_dot_product_attention

from fxpass.kernels.invariant import attention_cpu, cpu_library
from fxpass.kernels.invariant.attention_cpu import attention

LENGTH = 300
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module", autouse=True)
def _built():
    cpu_library.build_all(DTYPES)


def operands(
    dtype: torch.dtype, batch: int = 2, heads: tuple[int, int] = (4, 2), length: int = LENGTH
) -> Tensors:
    """q, k, v with sizes 24 and 40."""
    shapes = ((heads[0], 24), (heads[1], 24), (heads[1], 40))
    return tuple(
        drawn(batch, count, length, size, dtype=dtype, seed=seed)
        for seed, (count, size) in enumerate(shapes)
    )


def exact(q, k, v, mask=None, causal=False, scale=None) -> Tensors:
    """In float64, with zeros for rows that see no key."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        scores += mask
    empty = (scores == -math.inf).all(-1)
    logs = scores.logsumexp(-1).masked_fill(empty, 0.0)
    return scores.softmax(-1).masked_fill(empty[..., None], 0.0) @ v, logs


def assert_close(found: Tensors, wanted: Tensors, dtype: torch.dtype) -> None:
    """A rounding to the dtype, and a few hundred of the type that sums, on values up to 4."""
    summing = 300 * torch.finfo(cpu_library.wide(dtype)).eps
    out, logs = found
    assert out.dtype == dtype
    assert logs.dtype == cpu_library.wide(dtype)
    torch.testing.assert_close(out.double(), wanted[0], rtol=torch.finfo(dtype).eps, atol=summing)
    torch.testing.assert_close(logs.double(), wanted[1], rtol=0, atol=summing)


# ---- A row alone and among others ---------------------------------------------------------------


@each_dtype
def test_decode_and_prefill_agree(dtype):
    q, k, v = operands(dtype)
    whole = attention(q, k, v, causal=True)
    for t in (1, 2, 63, 64, 127, 128, 129, 255, 256, 257, LENGTH):
        one = attention(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t])
        assert same(*((o, w[:, :, t - 1 : t]) for o, w in zip(one, whole, strict=True))), t
    # In pieces of a chunked prefill, whose masks are written out.
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for first, last in ((0, 5), (5, 133), (133, LENGTH)):
        part = attention(q[:, :, first:last], k, v, seen[first:last])
        assert same(*((p, w[:, :, first:last]) for p, w in zip(part, whole, strict=True)))


@each_dtype
@pytest.mark.parametrize("held", [math.nan, math.inf, 0.0])
def test_padding_changes_nothing_whatever_it_holds(dtype, held):
    q, k, v = operands(dtype)
    wanted = attention(q, k, v)
    for before, behind in ((0, 7), (0, 256), (0, 4096)):
        padded = [torch.nn.functional.pad(t, (0, 0, before, behind), value=held) for t in (k, v)]
        seen = torch.arange(LENGTH + behind) < LENGTH
        added = torch.zeros(LENGTH + behind).masked_fill(~seen, -math.inf)
        for mask in (seen[None, None, None], seen.expand(1, 1, LENGTH, -1), added, added[None]):
            found = attention(q, *padded, mask)
            assert same(*zip(found, wanted, strict=True)), behind


@each_dtype
def test_masked_keys_inside_a_row(dtype):
    """What a key between visible ones holds does not matter; its place does, as k's order does."""
    q, k, v = operands(dtype)
    seen = torch.arange(LENGTH) % 3 != 1
    wanted = attention(q, k, v, seen)
    k[:, :, 1::3], v[:, :, 1::3] = math.nan, -math.inf
    assert same(*zip(attention(q, k, v, seen), wanted, strict=True))


@each_dtype
def test_later_keys_with_nan_do_not_reach_causal_rows(dtype):
    q, k, v = operands(dtype)
    wanted = attention(q, k, v, causal=True)
    k[:, :, 200:], v[:, :, 250:] = math.nan, math.inf
    found = attention(q, k, v, causal=True)
    assert same(*((f[:, :, :200], w[:, :, :200]) for f, w in zip(found, wanted, strict=True)))
    assert found[0][:, :, 200:].isnan().all()


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_row_does_not_depend_on_batch_heads_or_threads(dtype, causal):
    q, k, v = operands(dtype, batch=5, heads=(6, 2), length=140)
    mask = drawn(5, 1, 140, 140, dtype=torch.float32, seed=7)
    whole = attention(q, k, v, mask, causal=causal)
    for b in range(5):
        one = attention(q[b, None], k[b, None], v[b, None], mask[b, None], causal=causal)
        assert same(*((o[0], w[b]) for o, w in zip(one, whole, strict=True)))
    for h in range(6):
        kv = slice(h // 3, h // 3 + 1)
        one = attention(q[:, h, None], k[:, kv], v[:, kv], mask, causal=causal)
        assert same(*((o[:, 0], w[:, h]) for o, w in zip(one, whole, strict=True)))
    for count in (1, 2):
        with threads(count):
            again = attention(q, k, v, mask, causal=causal)
        assert same(*zip(again, whole, strict=True))
    for rows in (1, 2, 3, 7, 8, 31, 64):
        if not causal:
            part = attention(q[:, :, -rows:], k, v, mask[:, :, -rows:])
            assert same(*((p, w[:, :, -rows:]) for p, w in zip(part, whole, strict=True)))


@pytest.mark.parametrize("causal", [False, True])
def test_scratch_changes_no_bit(monkeypatch, causal):
    q, k, v = operands(torch.bfloat16, batch=3)
    mask = drawn(3, 4, 1, LENGTH, dtype=torch.float32) > 0
    wanted = attention(q, k, v, mask, causal=causal)
    for scratch in (1, 5000, 50_000, 500_000):  # bytes: one row, some rows, two batches, ...
        monkeypatch.setattr(attention_cpu, "_SCRATCH", scratch)
        assert same(*zip(attention(q, k, v, mask, causal=causal), wanted, strict=True))


@each_dtype
def test_layouts(dtype):
    q, k, v = operands(dtype, length=70)
    wanted = attention(q, k, v, causal=True)
    for name in layouts(q):
        found = attention(*(layouts(t)[name] for t in (q, k, v)), causal=True)
        assert same(*zip(found, wanted, strict=True)), name
    across = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert same(*zip(attention(*across, causal=True), wanted, strict=True))


@settings(max_examples=40)
@given(
    length=st.integers(1, 200),
    row=st.integers(0, 199),
    groups=st.integers(1, 3),
    shared=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_any_row_of_any_prefill(length, row, groups, shared, dtype):
    q, k, v = operands(dtype, batch=1, heads=(groups * shared, groups), length=length)
    t = row % length + 1
    whole = attention(q, k, v, causal=True)
    one = attention(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t])
    assert same(*((o, w[:, :, t - 1 : t]) for o, w in zip(one, whole, strict=True)))


# ---- The value ----------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_close_to_the_truth(dtype, causal):
    q, k, v = operands(dtype)
    assert_close(attention(q, k, v, causal=causal), exact(q, k, v, causal=causal), dtype)
    short = q[:, :, :17]
    found = attention(short, k, v, causal=causal, scale=0.7)
    assert_close(found, exact(short, k, v, causal=causal, scale=0.7), dtype)
    few = (k[:, :, :20], v[:, :, :20])
    assert_close(attention(q, *few, causal=causal), exact(q, *few, causal=causal), dtype)


@each_dtype
def test_masks_of_every_shape(dtype):
    q, k, v = operands(dtype, length=40)
    sizes = itertools.product((1, 2), (1, 4), (1, 40), (1, 40))
    for shape in [*sizes, (40, 40), (1, 40), (40,), ()]:
        added = drawn(*shape, dtype=torch.float32)
        for mask in (added, added > -1):
            assert_close(attention(q, k, v, mask), exact(q, k, v, mask), dtype)
    assert_close(attention(q, k, v, added.to(dtype)), exact(q, k, v, added.to(dtype)), dtype)


@each_dtype
def test_rows_without_keys_are_zero_as_in_torch(dtype):
    q, k, v = operands(dtype, heads=(2, 2), length=40)
    seen = torch.ones(40, 40, dtype=torch.bool)
    seen[3], seen[39, :] = False, False
    for mask in (seen, torch.zeros(40, 40, dtype=dtype).masked_fill(~seen, -math.inf)):
        out, logs = attention(q, k, v, mask)
        assert_close((out, logs), exact(q, k, v, mask), dtype)
        assert same((out[:, :, 3], torch.zeros_like(out[:, :, 3])))
        theirs = scaled_dot_product_attention(q, k, v, mask)
        assert torch.equal(theirs[:, :, 3], out[:, :, 3])
        assert (logs[:, :, [3, 39]] == 0).all()
    with_nan = v.clone()
    with_nan[:, :, 5] = math.nan
    assert same((attention(q, k, with_nan, seen)[0][:, :, 3], out[:, :, 3]))
    assert not attention(q, k[:, :, :0], v[:, :, :0])[0].any()


def test_logsumexp_is_that_of_torch():
    q, k, v = (drawn(2, 3, 50, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    for found, wanted in zip(attention(q, k, v, causal=True), flash, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # 300 ulps on values of 1


def test_nan_in_a_visible_place_is_seen():
    q, k, v = operands(torch.float32, length=20)
    q[0, 0, 3], v[0, 0, 5, 7] = math.nan, math.nan
    out, logs = attention(q, k, v, causal=True)
    assert out[0, 0, 3].isnan().all()
    assert logs[0, 0, 3].isnan()
    assert not out[0, 0, 4].isnan().any()
    assert out[0, 0, 5:, 7].isnan().all()
    assert not out[0, 0, 5:, :7].isnan().any()


@each_dtype
def test_without_a_library(dtype):
    q, k, v = operands(dtype, length=70)
    added = drawn(70, 70, dtype=torch.float32).masked_fill(torch.eye(70) == 1, -math.inf)
    for mask, causal in ((None, True), (added, False), (added > 0, True)):
        found = attention(q, k, v, mask, causal=causal)
        with without_library():
            plain = attention(q, k, v, mask, causal=causal)
            alone = attention(q[1:], k[1:], v[1:], mask, causal=causal)
        assert_close(plain, tuple(t.double() for t in exact(q, k, v, mask, causal)), dtype)
        assert_close(plain, (found[0].double(), found[1].double()), dtype)
        assert same(*((p[1:], a) for p, a in zip(plain, alone, strict=True)))


# ---- Edges --------------------------------------------------------------------------------------


def test_nothing_to_attend():
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        out, logs = attention(
            torch.ones(shape), torch.ones(shape[0], 1, 4, 8), torch.ones(shape[0], 1, 4, 3)
        )
        assert out.shape == (*shape[:3], 3)
        assert logs.shape == shape[:3]


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8)),
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 9), torch.ones(1, 2, 4, 8)),
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 5, 8)),
        (torch.ones(2, 4, 8), torch.ones(2, 4, 8), torch.ones(2, 4, 8)),
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8).double(), torch.ones(1, 2, 4, 8)),
    ],
)
def test_what_does_not_fit(q, k, v):
    with pytest.raises(ValueError, match=r"needs|fit"):
        attention(q, k, v)
