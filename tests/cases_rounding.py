"""Where values are rounded: dtypes, casts, weights, biases, and x itself in 16 bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import CAST, GEMMA, LLAMA, PLAIN, RSQRT, SCALE_CAST, SCALED, W, X, matches

BF16 = f"x=bf16 row={RSQRT} element="


def unit(x, eps=1e-6):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


@matches("rms_norm.cast_then_scale", LLAMA, X, W)
def llama(x, w):
    return w * unit(x).to(x.dtype)


@matches("rms_norm.cast_then_scale", LLAMA.replace("bf16", "f16"), "f16[2,8,64]", "f16[64]")
def llama_f16(x, w):
    return w * unit(x).half()


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W)
def scale_then_cast(x, w):
    return (unit(x) * w.float()).to(x.dtype)


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W)
def scale_then_cast_mixed_product(x, w):
    return (w * unit(x)).bfloat16()


@matches("rms_norm.scale_then_cast", GEMMA, X, W)
def gemma(x, w):
    return (unit(x) * (1.0 + w.float())).type_as(x)


GEMMA_16 = GEMMA.replace("1.0:f32", "1.0:bf16")


@matches("rms_norm.scale_then_cast", GEMMA_16, X, W)
def gemma_offset_in_16_bit(x, w):
    return (unit(x) * (w + 1)).type_as(x)


@matches("rms_norm.scale_then_cast", GEMMA_16, X, W)
def gemma_offset_in_16_bit_widened(x, w):
    return (unit(x) * (1 + w).float()).type_as(x)


@matches(
    "rms_norm.cast_then_scale",
    LLAMA + " offset=1.0:bf16", X, W,
)  # fmt: skip
def offset_after_the_cast(x, w):
    return unit(x).type_as(x) * (1 + w)


@matches("rms_norm.scale_then_cast", GEMMA.replace("1.0:f32", "0.5:f32"), X, W)
def another_offset(x, w):
    return ((w.float() + 0.5) * unit(x)).type_as(x)


@matches("rms_norm", f"{BF16}mul_row:f32", X)
def never_narrowed(x):
    return unit(x)


@matches("rms_norm.scale", f"{BF16}mul_row:f32,mul_weight:f32 weight=bf16", X, W)
def never_narrowed_scaled(x, w):
    return unit(x) * w


@matches("rms_norm.cast", CAST, X)
def cast_alone(x):
    return unit(x).to(x.dtype)


@matches("rms_norm", PLAIN, "f32[2,8,64]")
def float32(x):
    return unit(x)


@matches("rms_norm.scale", SCALED, "f32[2,8,64]", "f32[64]")
def float32_scaled(x, w):
    return w * unit(x)


@matches("rms_norm.cast", PLAIN + ",cast:bf16", "f32[2,8,64]")
def float32_narrowed(x):
    return unit(x).bfloat16()


@matches(
    "rms_norm.cast_then_scale",
    PLAIN + ",cast:bf16,mul_weight:bf16 weight=bf16", "f32[2,8,64]", W,
)  # fmt: skip
def float32_stream_llama(x, w):
    return w * unit(x).to(w.dtype)


@matches("rms_norm.scale", PLAIN + ",mul_weight:f32 weight=bf16", "f32[2,8,64]", W)
def float32_stream_narrow_weight(x, w):
    return w * unit(x)


@matches(
    "rms_norm.cast_then_scale",
    f"{BF16}mul_row:f32,cast:bf16,mul_weight:f32 weight=f32", X, "f32[64]",
)  # fmt: skip
def float32_weight_promotes(x, w):
    return w * unit(x).to(x.dtype)


@matches(
    "rms_norm.cast_then_scale_then_cast",
    f"{BF16}mul_row:f32,cast:bf16,mul_weight:f32,cast:bf16 weight=f32", X, "f32[64]",
)  # fmt: skip
def float32_weight_cast_back(x, w):
    return (w * unit(x).to(x.dtype)).to(x.dtype)


@matches("rms_norm.scale_then_cast", SCALE_CAST.replace("weight=bf16", "weight=f32"), X, "f32[64]")
def functional_float32_weight(x, w):
    return F.rms_norm(x, (64,), w, 1e-6)


@matches("rms_norm.cast_then_scale", f"{BF16}mul_row:f32,cast:f16,mul_weight:f32 weight=bf16", X, W)
def cast_to_the_other_16_bit_type(x, w):
    return unit(x).half() * w


# The second cast and the product stay in the graph. Inductor drops the first cast before its hooks,
# unless it is told to emulate casts, as numerics="eager" does.
@matches("rms_norm.cast", f"{BF16}mul_row:f32,cast:f16", X, W,
         aten=("rms_norm.cast_then_scale", LLAMA))  # fmt: skip
def cast_to_both_16_bit_types(x, w):
    return w * unit(x).half().bfloat16()


@matches("rms_norm.cast_then_scale", LLAMA, X, W)
def inverse_meets_the_narrow_x(x, w):
    inverse = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * inverse).to(w.dtype)


ROW_CAST = f"x=bf16 row={RSQRT},cast:bf16 element=mul_row:bf16"


@matches("rms_norm", ROW_CAST, X)
def inverse_cast_before_the_product(x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


@matches("rms_norm.scale", ROW_CAST + ",mul_weight:bf16 weight=bf16", X, W)
def inverse_cast_then_scale(x, w):
    return w * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).type_as(x))


EACH = "x=bf16 square=bf16 row=mean:bf16,add_eps:bf16,{} element={}"


@matches("rms_norm", EACH.format("rsqrt:bf16", "mul_row:bf16"), X)
def all_in_16_bit(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@matches(
    "rms_norm.scale",
    EACH.format("sqrt:bf16", "div_row:bf16,mul_weight:bf16 weight=bf16"), X, W,
)  # fmt: skip
def image_gpt(x, w):
    return x / torch.sqrt(torch.mean(torch.square(x), dim=-1, keepdim=True) + 1e-6) * w


@matches("rms_norm", EACH.replace("bf16", "f16").format("rsqrt:f16", "mul_row:f16"), "f16[2,8,64]")
def all_in_float16(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


@matches(
    "rms_norm",
    "x=bf16 square=bf16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32", X,
)  # fmt: skip
def narrow_squares_wide_mean(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-6)


@matches("rms_norm.scale_bias", SCALED.replace(" weight", ",add_bias:f32 weight") + " bias=f32",
         "f32[2,8,64]", "f32[64]", "f32[64]")  # fmt: skip
def bias(x, w, b):
    return unit(x) * w + b


@matches(
    "rms_norm.cast_then_scale_bias",
    LLAMA.replace(" weight", ",add_bias:bf16 weight") + " bias=bf16", X, W, W,
)  # fmt: skip
def cast_then_bias(x, w, b):
    return b + w * unit(x).to(x.dtype)


@matches(
    "rms_norm.scale_bias_then_cast",
    f"{BF16}mul_row:f32,mul_weight:f32,add_bias:f32,cast:bf16 weight=bf16 bias=bf16", X, W, W,
)  # fmt: skip
def bias_then_cast(x, w, b):
    return (unit(x) * w.float() + b.float()).to(x.dtype)


@matches(
    "rms_norm.scale_then_cast_bias",
    f"{BF16}mul_row:f32,mul_weight:f32,cast:bf16,add_bias:bf16 weight=bf16 bias=bf16", X, W, W,
)  # fmt: skip
def scale_then_cast_then_bias(x, w, b):
    return (unit(x) * w.float()).to(x.dtype) + b


@matches("rms_norm.cast_then_scale", LLAMA, X, "bf16[1,1,64]")
def weight_with_leading_ones(x, w):
    return w * unit(x).to(x.dtype)


@matches("rms_norm.cast_then_scale", LLAMA, X, "bf16[8,8]")
def weight_reshaped(x, w):
    return w.reshape(64) * unit(x).to(x.dtype)


@matches("rms_norm.cast_then_scale", LLAMA, X, "bf16[128]")
def weight_sliced(x, w):
    return w[32:96] * unit(x).to(x.dtype)


@matches("rms_norm.cast_then_scale", LLAMA, X, "bf16[128]")
def weight_strided(x, w):
    return w[::2] * unit(x).to(x.dtype)


@matches("rms_norm.cast_then_scale", LLAMA, X, "bf16[3,64]")
def weight_row_of_a_table(x, w):
    return w[1] * unit(x).to(x.dtype)


@matches("rms_norm.weight_first", f"x=f32 row={RSQRT} element=mul_weight:f32,mul_row:f32"
         " weight=f32", "f32[2,8,64]", "f32[64]")  # fmt: skip
def weight_before_the_inverse(x, w):
    return w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# --- L2 ----------------------------------------------------------------------------------

L2 = "x=bf16 row=sum:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32"


@matches("l2_norm", L2, X)
def l2(x):
    h = x.float()
    return h * torch.rsqrt((h * h).sum(-1, keepdim=True) + 1e-6)


@matches("l2_norm", L2.replace("rsqrt", "sqrt").replace("mul_row", "div_row"), X)
def l2_divided(x):
    h = x.float()
    return h / torch.sqrt((h * h).sum(-1, keepdim=True) + 1e-6)


@matches("l2_norm.clamped", L2.replace("add_eps", "clamp_eps"), X)
def l2_clamped(x):
    h = x.float()
    return h * torch.rsqrt((h * h).sum(-1, keepdim=True).clamp_min(1e-6))


@matches("l2_norm.no_eps", "x=bf16 row=sum:f32,sqrt:f32,cast:bf16 element=div_row:bf16", X,
         exact=False)  # fmt: skip
def l2_by_norm(x):
    return x / x.norm(p=2, dim=-1, keepdim=True)


NORMALIZE = "row=sum:f32,sqrt:f32,clamp_eps:f32 element=div_row:f32"


@matches("l2_norm.normalize", f"x=f32 {NORMALIZE}", "f32[2,8,64]", exact=False)
def normalize(x):
    return F.normalize(x, dim=-1)


@matches(
    "l2_norm.normalize",
    "x=bf16 row=sum:f32,sqrt:f32,cast:bf16,clamp_eps:bf16 element=div_row:bf16", X, exact=False,
)  # fmt: skip
def normalize_in_16_bit(x):
    return F.normalize(x, p=2.0, dim=-1, eps=1e-6)


ZAYA = "x=bf16 row=sum:f32,sqrt:f32,cast:bf16,{},reciprocal:bf16,mul_const(8.0):bf16"
ZAYA_ATEN = ZAYA.format("clamp_eps:f32,cast:bf16")
if torch.__version__ < "2.13":  # vector_norm of bf16 decomposed without a rounding of its own
    ZAYA_ATEN = ZAYA_ATEN.replace("sqrt:f32,cast:bf16", "sqrt:f32")


@matches("l2_norm.normalize", ZAYA.format("clamp_eps:bf16") + " element=mul_row:bf16", X,
         aten=("l2_norm.normalize", ZAYA_ATEN + " element=mul_row:bf16"))  # fmt: skip
def zaya(x):
    return x * (x.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-6).reciprocal() * 8.0)
