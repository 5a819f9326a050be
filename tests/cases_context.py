"""Norms among other operators: views, heads, groups, gates, modulation, autocast, training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import CAST, LLAMA, PLAIN, RSQRT, SCALE_CAST, W, X, matches
from cases_rounding import unit

NAME = "rms_norm.cast_then_scale"


def llama(x, w):
    return w * unit(x).to(w.dtype)


@matches(NAME, LLAMA, "bf16[2,8,96]", "bf16[16]", "bf16[16]", more=((NAME, LLAMA),))
def packed_query_and_key(qkv, wq, wk):
    q, k, v = qkv.split(32, dim=-1)
    q, k = (t.view(2, 8, 2, 16) for t in (q, k))
    return llama(q, wq).transpose(1, 2), llama(k, wk).transpose(1, 2), v


@matches(NAME, LLAMA, "bf16[2,8,64]", "bf16[16]")
def after_transpose(x, w):
    return llama(x.view(2, 8, 4, 16).transpose(1, 2), w)


@matches(NAME, LLAMA, "bf16[2,8,3,4,16]", "bf16[16]")
def select_of_packed(qkv, w):
    return llama(qkv[:, :, 1], w)


@matches(NAME, LLAMA, "bf16[2,8,4,16]", "bf16[4,16]")
def weight_per_head(x, w):
    return llama(x, w)


@matches("rms_norm", PLAIN, "f32[2,3,4,16]")
def last_two_dims(x):
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6)


@matches("rms_norm.cast", CAST, X, W)
def grouped_then_scaled(x, w):
    h = unit(x.view(2, 8, 4, 16)).to(x.dtype)
    return w * h.view(2, 8, 64)


@matches(NAME, LLAMA, X, W, X)
def gated(x, w, gate):
    return (llama(x, w) * F.silu(gate.float())).to(x.dtype)


@matches("rms_norm.cast", CAST, X, "bf16[2,1,64]", "bf16[2,1,64]")
def modulated(x, scale, shift):
    return unit(x).to(x.dtype) * (1 + scale) + shift


@matches(NAME, LLAMA, X, W, "bf16[2,1,64]")
def scaled_then_modulated(x, w, scale):
    return llama(x, w) * (1 + scale)


@matches("rms_norm", PLAIN + " outputs=out,row", "f32[2,8,64]")
def inverse_returned(x):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * inverse, inverse


@matches("rms_norm", PLAIN + " outputs=out,row", "f32[2,8,64]")
def inverse_returned_without_its_dim(x):
    inverse = torch.rsqrt(x.pow(2).mean(-1) + 1e-6)
    return x * inverse.unsqueeze(-1), inverse


@matches("rms_norm", PLAIN + " outputs=out,row", "f32[2,8,64]", "f32[2,8,64]")
def inverse_used_again(x, y):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * inverse, y * inverse


@matches("rms_norm", PLAIN, "f32[2,8,64]", "f32[64]", "f32[64]")
def two_weights_share_the_normalised_value(x, w, v):
    h = unit(x)
    return h * w, h * v


@matches(NAME, LLAMA, X, W, W, more=((NAME, LLAMA), ("rms_norm", PLAIN.replace("x=f32", "x=bf16"))))
def normalised_value_computed_thrice(x, w, v):
    return llama(x, w), llama(x, v), unit(x)


@matches(
    "l2_norm.normalize",
    "x=f32 row=sum:f32,sqrt:f32,clamp_eps:f32 element=div_row:f32", "f32[2,8,64]",
    more=(("rms_norm", PLAIN),), exact=False,
)  # fmt: skip
def two_families_of_one_tensor(x):
    return F.normalize(x, dim=-1), unit(x)


@matches("rms_norm.cast", CAST, X)
def normalised_value_used_twice(x):
    h = unit(x).to(x.dtype)
    return h.sin(), h.cos()


@matches(NAME, LLAMA, X, W, more=((NAME, LLAMA),))
def norm_of_a_norm(x, w):
    return llama(llama(x, w), w)


@matches("rms_norm", PLAIN, "f32[64]")
def one_row(x):
    return x * torch.rsqrt(x.pow(2).mean() + 1e-6)


@matches("rms_norm", PLAIN, "f32[2,8,1]")
def one_element(x):
    return unit(x)


@matches(NAME, LLAMA, "bf16[0,64]", W)
def no_rows(x, w):
    return llama(x, w)


@matches(NAME, LLAMA, "bf16[64,2,8]", W)
def channels_moved_last(x, w):
    return llama(x.permute(1, 2, 0), w)


@matches("rms_norm.scale_then_cast", SCALE_CAST, "bf16[64,2,8]", W)
def copied_before_the_cast(x, w):
    """What AOTAutograd makes of F.rms_norm on a permuted x: eager's result is contiguous."""
    return F.rms_norm(x.permute(1, 2, 0), (64,), w, 1e-6)


@matches("rms_norm.cast", CAST, "bf16[64,2,8]")
def copied_at_the_end(x):
    return unit(x.permute(1, 2, 0)).to(x.dtype).contiguous()


@matches(NAME, LLAMA, "bf16[64,2,8]", W)
def copied_before_the_weight(x, w):
    return w * unit(x.permute(1, 2, 0)).to(w.dtype).contiguous()


@matches("rms_norm.cast", CAST, "bf16[64,2,8]")
def copied_and_read_before(x):
    y = unit(x.permute(1, 2, 0)).to(x.dtype)
    return y.contiguous(), y


@matches("rms_norm.cast", CAST, "bf16[64,2,8]")
def copied_in_two_orders(x):
    y = unit(x.permute(1, 2, 0)).to(x.dtype)
    return y.contiguous(), y.clone(memory_format=torch.preserve_format), y.mT.contiguous()


@matches("rms_norm.cast", CAST, "bf16[64,2,8]")
def a_contiguous_copy_normed(x):
    y = x.permute(1, 2, 0).contiguous()
    return unit(y).to(x.dtype), y


@matches("rms_norm", PLAIN, "f32[2,8,1]")
def expanded_input(x):
    return unit(x.expand(2, 8, 64))


@matches(NAME, LLAMA, "bf16[2,8,128]", W)
def every_second_element(x, w):
    return llama(x[..., ::2], w)


@matches(NAME, LLAMA, "bf16[2,8,64]", W)
def every_second_row(x, w):
    return llama(x[:, ::2], w)


@matches("rms_norm.scale", f"x=f32 row={RSQRT} element=mul_row:f32,mul_weight:f32 weight=f32",
         "f32[2,8,64]", "f32[64]", "f32[64,64]", aten=("rms_norm.scale_then_cast",
         f"x=f32 row={RSQRT} element=mul_row:f32,mul_weight:f32,cast:bf16 weight=f32"))  # fmt: skip
def autocast(x, w, p):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(unit(x) * w, p)


@matches("rms_norm.scale", f"x=bf16 row={RSQRT} element=mul_row:f32,mul_weight:f32 weight=f32",
         "f32[2,8,64]", "f32[64]", "f32[64,64]")  # fmt: skip
def autocast_after_a_product(x, w, p):
    with torch.autocast("cpu", torch.bfloat16):
        return unit(F.linear(x, p)) * w


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W, "bf16[64,64]")
def before_a_linear(x, w, p):
    return F.linear(F.rms_norm(x, (64,), w, 1e-6), p)


@matches("rms_norm", f"x=f32 row={RSQRT} element=mul_row:f32", "f32[2,8,64]", "f32[2,8,64]")
def difference_of_two_tensors(x, y):
    return unit(x - y)


@matches("rms_norm", f"x=f32 row={RSQRT} element=mul_row:f32", "f32[2,8,64]")
def a_dropped_tail(x):
    return unit(x).view(16, 64)[:3]


@matches(NAME, LLAMA, "bf16[2,8,64]", W, dynamic=True)
def dynamic_llama(x, w):
    return llama(x, w)


@matches(NAME, LLAMA, "bf16[2,8,96]", "bf16[16]", dynamic=True)
def dynamic_heads(x, w):
    return llama(x.view(x.shape[0], x.shape[1], 6, 16).transpose(1, 2), w)


@matches(NAME, LLAMA.replace("x=bf16", "x=bf16 residual=bf16 sum=bf16") + " outputs=out,sum",
         X, X, W, dynamic=True)  # fmt: skip
def dynamic_residual(x, r, w):
    h = x + r
    return llama(h.view(-1, 64), w), h


# --- equal operations whose results differ only in shape ------------------------------------


@matches("rms_norm", PLAIN, "f32[8,8]")
def mean_with_and_without_its_dim(x):
    wrong = x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)
    return unit(x), wrong


@matches("rms_norm", PLAIN, "f32[8,8]")
def mean_without_and_with_its_dim(x):
    right = unit(x)
    return right, x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)


GAIN = (
    "x=f32 row=mean:f32,add_eps:f32,sqrt:f32,reciprocal:f32,mul_const(0.5):f32 element=mul_row:f32"
)


@matches("rms_norm", GAIN, "f32[8,8]")
def gain_equal_to_eps(x):
    return x * ((1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.5)) * 0.5)


@matches("rms_norm", PLAIN, "f32[6,16]", "f32[6,16]")
def gate_as_large_as_x(x, gate):
    return unit(x) * gate
