"""A residual add before the norm: who reads the sum, in which dtype, through which views."""

from __future__ import annotations

import torch
from cases import GEMMA, LLAMA, RSQRT, SCALE_CAST, W, X, matches
from cases_rounding import unit

ADD = LLAMA.replace("x=bf16", "x=bf16 residual=bf16 sum=bf16")
SUM = ADD + " outputs=out,sum"
NAME = "rms_norm.cast_then_scale"


def llama(x, w):
    return w * unit(x).to(w.dtype)


@matches(NAME, ADD, X, X, W)
def sum_unused(x, r, w):
    return llama(x + r, w)


@matches(NAME, SUM, X, X, W)
def sum_returned(x, r, w):
    h = x + r
    return llama(h, w), h


@matches(NAME, SUM, X, X, W)
def sum_returned_first(x, r, w):
    h = torch.add(r, x)
    return h, llama(h, w)


@matches(NAME, SUM, X, X, W)
def sum_read_three_times(x, r, w):
    h = x + r
    y = llama(h, w)
    return h + y, h.sin(), h.view(16, 64)


@matches(NAME, ADD.replace("bf16", "f32", 3).replace("f32,cast:bf16,mul_weight:bf16",
         "f32,cast:bf16,mul_weight:bf16"), "f32[2,8,64]", "f32[2,8,64]", W)  # fmt: skip
def float32_stream(x, r, w):
    return llama(x + r, w)


@matches(NAME, SUM.replace("residual=bf16 sum=bf16", "residual=f32 sum=f32"), X, "f32[2,8,64]", W)
def mixed_stream(x, r, w):
    h = x + r
    return llama(h, w), h


@matches(NAME, SUM.replace("residual=bf16 sum=bf16", "residual=bf16 sum=f32"), X, X, W)
def widened_stream(x, r, w):
    h = x.float() + r.float()
    return llama(h, w), h


@matches(NAME, SUM, "bf16[16,64]", "bf16[16,64]", W)
def add_seen_through_a_view(x, r, w):
    h = x + r
    return llama(h.view(2, 8, 64), w), h


@matches(NAME, SUM, X, X, X, W)
def three_addends(a, b, c, w):
    h = a + b + c
    return llama(h, w), h


@matches(NAME, LLAMA, X, X, W, W, more=((NAME, SUM),))
def two_norms_of_one_sum(x, r, w, v):
    h = x + r
    h32 = h.float()
    other = h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + 1e-5)
    return llama(h, w), v * other.to(h.dtype), h


@matches(NAME, SUM, X, X, W, levels=("aten",))
def in_place_add(x, r, w):
    h = x.sin()
    h.add_(r)
    return llama(h, w), h


@matches(NAME, ADD, X, W)
def added_to_itself(x, w):
    return llama(x + x, w)


@matches(NAME, LLAMA, X, "bf16[64]", W)
def a_broadcast_add_is_no_residual(x, b, w):
    return llama(x + b, w)


@matches(NAME, LLAMA, X, X, W)
def a_scaled_add_is_no_residual(x, r, w):
    return llama(torch.add(x, r, alpha=2), w)


@matches("rms_norm.scale_then_cast", GEMMA.replace("x=bf16", "x=bf16 residual=bf16 sum=bf16")
         + " outputs=out,sum", X, X, W, more=(("rms_norm.scale_then_cast",
         SCALE_CAST.replace("x=bf16", "x=bf16 residual=bf16 sum=bf16")),))  # fmt: skip
def two_layers(x, r, w):
    h = x + r
    y = (unit(h) * (1 + w.float())).to(h.dtype)
    return torch.nn.functional.rms_norm(h + y, (64,), w, 1e-6)


@matches(NAME, SUM, X, X, W)
def sum_returned_through_a_view(x, r, w):
    h = x + r
    return llama(h, w), h.transpose(0, 1)


@matches("rms_norm", f"x=f32 residual=f32 sum=f32 row={RSQRT} element=mul_row:f32"
         " outputs=out,sum,row", "f32[2,8,64]", "f32[2,8,64]")  # fmt: skip
def sum_and_inverse_returned(x, r):
    h = x + r
    inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h * inverse, h, inverse


@matches(NAME, SUM, X, X, W, W, more=((NAME, LLAMA),))
def second_weight_made_from_the_first_norm(x, r, w, v):
    h = x + r
    first = llama(h, w)
    h32 = h.float()
    other = h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + 1e-5)
    return first, (v * first.mean()) * other.to(h.dtype), h


@matches(NAME, SUM, X, X, W, W, more=((NAME, LLAMA),))
def sum_read_between_two_norms(x, r, w, v):
    h = x + r
    first = llama(h, w)
    made = v * h.float().mean()
    return first, made.to(v.dtype) * unit(h, 1e-5).to(h.dtype), h


@matches(NAME, LLAMA, "bf16[2,8,1]", X, W)
def expanded_addend_is_no_residual(x, r, w):
    return llama(x + r, w)


@matches("rms_norm", f"x=f32 row={RSQRT} element=mul_row:f32", "f32[2,32,4]", "f32[2,32,4]")
def regrouped_sum_of_two_dims(x, r):
    h = (x + r).view(2, 8, 4, 4)
    return h * torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + 1e-6)


@matches(NAME, LLAMA, X, X, W)
def weight_made_after_the_sum_was_read(x, r, w):
    h = x + r
    made = (w * h.mean()).to(w.dtype)
    return llama(h, made)
