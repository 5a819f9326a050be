"""What the tests of the GPU attention share: its meaning in float64, inputs and masks."""

from __future__ import annotations

import math

import torch

from fxpass.kernels.invariant import attention_gpu, attention_plan

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def given(batch, heads, shared, lq, lk, head, wide=None, dtype=torch.float32, seed=0):
    """q (batch, heads, lq, head), and k and v with `shared` heads, the latter `wide` long."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=made).to(dtype)

    wide = head if wide is None else wide
    return (
        normal(batch, heads, lq, head),
        normal(batch, shared, lk, head),
        normal(batch, shared, lk, wide),
    )


def meaning(q, k, v, mask=None, causal=False, scale=None):
    """(out, logsumexp) in float64; 0 for rows that see nothing."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    return weights @ v, scores.logsumexp(-1).masked_fill(nothing[..., 0], 0.0)


def assert_close(found, wanted, dtype):
    """One rounding to dtype of the weights, one of the result; float32 sums of a few values of 1.

    The weights sum to 1 and values are below 5, so the weights' rounding moves a result by less
    than 5 times half an epsilon; a score's float32 rounding moves a weight by 2**-20 of it.
    """
    epsilon = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-19
    out, lse = found
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted[0], rtol=epsilon, atol=3 * epsilon)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)


def same(found, wanted):
    """Equal values, signs of zeros and places of NaN of (out, logsumexp)."""
    return all(
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))
        and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())
        for a, b in zip(found, wanted, strict=True)
    )


def attend(q, k, v, mask=None, **named):
    return attention_gpu.attention(q, k, v, mask, **named)


SCHEDULES = {
    "single": attention_plan.Schedule(1, 16, 4, 1, False),
    "packed": attention_plan.Schedule(4, 16, 4, 2, False),
    "tall": attention_plan.Schedule(1, 64, 4, 2, False),
    "packed_tall": attention_plan.Schedule(4, 128, 8, 2, False),
    "split": attention_plan.Schedule(1, 32, 4, 2, True),
    "packed_split": attention_plan.Schedule(4, 16, 2, 3, True),
}
"""For groups of 4 heads."""


def use(monkeypatch, chosen):
    """Take this schedule for every attention."""
    monkeypatch.setattr(attention_plan, "schedule", lambda *_: chosen)
    monkeypatch.setattr(attention_gpu, "_plans", {})
