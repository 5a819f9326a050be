"""Attention on a GPU: one result for every schedule, batch and way to the same position."""

from __future__ import annotations

import math

import pytest
import torch
from invariant_attention_cases import (
    FLOATS,
    SCHEDULES,
    assert_close,
    attend,
    given,
    meaning,
    same,
    use,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = torch.bfloat16


def on_gpu(*shape, dtype=BF16, seed=0):
    return [t.cuda() for t in given(*shape, dtype=dtype, seed=seed)]


@pytest.mark.parametrize(
    ("head", "dtype"),
    [*((head, BF16) for head in (16, 64, 80, 128, 256)), *((64, dtype) for dtype in FLOATS[1:])],
)
def test_close_to_float64(head: int, dtype: torch.dtype) -> None:
    for lq, lk in ((1, 1500), (200, 300)):
        q, k, v = on_gpu(2, 4, 2, lq, lk, head, dtype=dtype)
        for mask, causal in (
            (None, False),
            (None, True),
            (torch.rand(lq, lk, device="cuda") > 0.3, False),
        ):
            found = attend(q, k, v, mask, causal=causal)
            assert_close(found, meaning(q, k, v, mask, causal), dtype)


@pytest.mark.parametrize(
    ("head", "dtype"), [(64, BF16), (128, BF16), (256, BF16), (64, torch.float32)]
)
def test_schedules_change_no_bit(
    head: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = on_gpu(1, 8, 2, 70, 1300, head, dtype=dtype)
    wanted = None
    for name, schedule in SCHEDULES.items():
        if dtype == torch.float32 and schedule.block_m > 64:
            continue
        chosen = schedule._replace(stages=1) if head == 256 else schedule
        use(monkeypatch, chosen)
        found = attend(q, k, v, causal=head == 64)
        wanted = found if wanted is None else wanted
        assert same(found, wanted), name


@pytest.mark.parametrize("shared", [1, 8])
def test_decode_is_prefill(shared: int) -> None:
    q, k, v = on_gpu(2, 8, shared, 1100, 1100, 128)
    whole = attend(q, k, v, causal=True)
    for t in (0, 1, 63, 64, 100, 511, 512, 600, 1099):
        for rows in (1, 2, 17):
            if t + rows > 1100:
                continue
            seen = torch.arange(t + rows, device="cuda")
            mask = None if rows == 1 else seen <= seen[t:, None]
            alone = attend(q[:, :, t : t + rows], k[:, :, : t + rows], v[:, :, : t + rows], mask)
            assert same(alone, [part[:, :, t : t + rows] for part in whole]), (t, rows)


def test_rows_do_not_depend_on_their_batch() -> None:
    q, k, v = on_gpu(64, 8, 2, 1, 900, 128)
    whole = attend(q, k, v)
    for batch in (1, 2, 3, 7, 33):
        assert same(attend(q[:batch], k[:batch], v[:batch]), [t[:batch] for t in whole])
        found = attend(q[-batch:].clone(), k[-batch:].clone(), v[-batch:].clone())
        assert same(found, [t[-batch:] for t in whole])
    odd = torch.zeros(64 * 8 * 131 + 1, dtype=BF16, device="cuda")[1:].view(64, 8, 1, 131)[
        ..., 2:-1
    ]
    odd.copy_(q)
    assert same(attend(odd, k, v), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_seen_does_not_matter(bad: float) -> None:
    q, k, v = on_gpu(2, 8, 2, 40, 1200, 64)
    mask = torch.rand(2, 1, 40, 1200, device="cuda") > 0.5
    mask[..., 700:] = False
    mask[0, :, :20, 100:200] = False
    wanted, causal = attend(q, k, v, mask), attend(q, k, v, causal=True)
    k[:, :, 700:], v[:, :, 700:] = bad, bad
    assert same(attend(q, k, v, mask), wanted)
    assert same(attend(q, k, v, torch.zeros_like(mask, dtype=BF16).masked_fill(~mask, -math.inf)),
                wanted)  # fmt: skip
    k[0, :, 30:], v[0, :, 30:] = bad, bad
    assert same([t[0, :, :30] for t in attend(q, k, v, causal=True)],
                [t[0, :, :30] for t in causal])  # fmt: skip


def test_as_torch_s_memory_efficient_kernel() -> None:
    """Meaning, logsumexp's scale, and rows that see nothing."""
    q, k, v = on_gpu(2, 4, 4, 64, 96, 64)
    for mask in (None, torch.rand(64, 96, device="cuda") > 0.3):
        told = None
        if mask is not None:
            mask[3] = False
            told = torch.zeros(64, 96, dtype=BF16, device="cuda").masked_fill(~mask, -math.inf)
            told = told.expand(2, 4, 64, 96)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, told, True)
        found = attend(q, k, v, mask)
        torch.testing.assert_close(found[0], out, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(found[1], lse[..., :64], rtol=1e-4, atol=1e-4)
        assert found[0].stride() == out.stride()
