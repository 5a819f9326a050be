"""Spellings that mean the same: squares, means, roots, epsilons. Llama's norm around each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import LLAMA, PLAIN, RSQRT, SCALE_CAST, W, X, matches

SQUARES: dict[str, Callable[[Any], Any]] = {
    "pow2": lambda x: x.float().pow(2),
    "pow2_float": lambda x: x.float().pow(2.0),
    "torch_pow": lambda x: torch.pow(x.float(), 2),
    "star_star": lambda x: x.float() ** 2,
    "star_star_float": lambda x: x.to(torch.float32) ** 2.0,
    "square": lambda x: x.float().square(),
    "torch_square": lambda x: torch.square(x.type(torch.float32)),
    "x_x": lambda x: x.float() * x.float(),
    "mul": lambda x: torch.mul(x.float(), x.to(torch.float32)),
    "mixed": lambda x: x * x.float(),
    "abs": lambda x: x.float().abs().pow(2),
}
MEANS: dict[str, Callable[[Any], Any]] = {
    "keepdim": lambda s: s.mean(-1, keepdim=True),
    "positive": lambda s: s.mean(s.dim() - 1, keepdim=True),
    "tuple": lambda s: s.mean(dim=(-1,), keepdim=True),
    "list": lambda s: torch.mean(s, [-1], True),
    "unsqueeze": lambda s: s.mean(-1).unsqueeze(-1),
    "index": lambda s: s.mean(-1)[..., None],
    "colons": lambda s: s.mean(-1)[:, :, None],
    "view": lambda s: s.mean(-1).view(*s.shape[:-1], 1),
}
DIVIDED: dict[str, Callable[[Any], Any]] = {
    "sum_over_64": lambda s: s.sum(-1, keepdim=True) / 64,
    "sum_over_shape": lambda s: s.sum(-1, keepdim=True) / s.shape[-1],
    "sum_over_size": lambda s: torch.sum(s, dim=-1, keepdim=True).div(s.size(-1)),
}
ROOTS: dict[str, Callable[[Any], Any]] = {
    "rsqrt": torch.rsqrt,
    "method": lambda v: v.rsqrt(),
    "pow": lambda v: v.pow(-0.5),
    "torch_pow": lambda v: torch.pow(v, -0.5),
    "star_star": lambda v: v**-0.5,
}
INVERSES: dict[str, Callable[[Any], Any]] = {
    "one_over": lambda v: 1 / torch.sqrt(v),
    "one_over_float": lambda v: 1.0 / v.sqrt(),
    "reciprocal": lambda v: torch.reciprocal(v.sqrt()),
    "sqrt_pow": lambda v: v.sqrt() ** -1,
    "half_pow": lambda v: v.pow(0.5).reciprocal(),
}
EPSILONS: dict[str, Callable[[Any], Any]] = {
    "right": lambda v: v + 1e-6,
    "left": lambda v: 1e-6 + v,
    "torch_add": lambda v: torch.add(v, 1e-6),
    "method": lambda v: v.add(1e-6),
    "int": lambda v: v + 1,
    "tensor_first": lambda v: torch.add(1e-6, v) if False else v.__add__(1e-6),
}


def norm(square="pow2", mean="keepdim", root="rsqrt", eps="right", swap=0) -> Callable[..., Any]:
    """Llama's norm in a chosen spelling; `swap` exchanges the operands of the two products."""
    means = {**MEANS, **DIVIDED}
    roots = {**ROOTS, **INVERSES}

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        root_of = roots[root](EPSILONS[eps](means[mean](SQUARES[square](x))))
        y = (root_of * x.float() if swap & 1 else x.float() * root_of).to(x.dtype)
        return y * w if swap & 2 else w * y

    return call


def spec_of(mean: str = "keepdim", root: str = "rsqrt") -> str:
    """The spec of `norm` in that spelling: only what rounds differently shows."""
    steps = "sum:f32,div_n:f32" if mean in DIVIDED else "mean:f32"
    inverse = "rsqrt:f32" if root in ROOTS else "sqrt:f32,reciprocal:f32"
    return LLAMA.replace(RSQRT, f"{steps},add_eps:f32,{inverse}")


def _each(word: str, table: dict[str, Any]) -> None:
    for name in table:
        kind = {"mean": "mean", "root": "root"}.get(word)
        spec = spec_of(**({kind: name} if kind else {}))
        add = matches("rms_norm.cast_then_scale", spec, X, W, id=f"{word}_{name}")
        add(norm(**{word: name}))


_each("square", SQUARES)
_each("mean", {**MEANS, **DIVIDED})
_each("root", {**ROOTS, **INVERSES})
_each("eps", EPSILONS)
for _swap in (1, 2, 3):
    matches("rms_norm.cast_then_scale", LLAMA, X, W, id=f"swap_{_swap}")(norm(swap=_swap))
for _mean in ("keepdim", "sum_over_shape", "sum_over_size"):
    matches("rms_norm.cast_then_scale", spec_of(_mean), X, W, id=f"dynamic_{_mean}", dynamic=True)(
        norm(mean=_mean)
    )


DIVIDE = "x=f32 row=mean:f32,add_eps:f32,sqrt:f32 element=div_row:f32"


@matches(
    "rms_norm",
    "x=f32 row=mean:f32,add_eps:f32,reciprocal:f32,sqrt:f32 element=mul_row:f32",
    "f32[2,8,64]",
)
def root_of_reciprocal(x):
    return x * torch.sqrt(1 / (x.pow(2).mean(-1, keepdim=True) + 1e-6))


@matches("rms_norm", DIVIDE, "f32[4,64]")
def divided_by_sqrt(x):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@matches("rms_norm.scale", f"{DIVIDE},mul_weight:f32 weight=f32", "f32[4,64]", "f32[64]")
def torch_div(x, w):
    return torch.div(x, (x.square().mean(-1, keepdim=True) + 1e-6) ** 0.5) * w


@matches("rms_norm", PLAIN.replace("mean:f32", "sum:f32,mul_n:f32"), "f32[4,48]")
def sum_times_reciprocal_length(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * (1 / 48) + 1e-6)


@matches("rms_norm.no_eps", PLAIN.replace("add_eps:f32,", ""), "f32[4,64]")
def without_eps(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


@matches("rms_norm.clamped", PLAIN.replace("add_eps", "clamp_eps"), "f32[4,64]")
def clamped(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-6))


@matches("rms_norm.clamped", PLAIN.replace("add_eps", "clamp_eps"), "f32[4,64]")
def clamp_min(x):
    return x * torch.rsqrt(torch.clamp_min(x.pow(2).mean(-1, keepdim=True), 1e-6))


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W)
def functional(x, w):
    return F.rms_norm(x, (64,), w, 1e-6)


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W)
def functional_without_eps(x, w):
    return F.rms_norm(x, (64,), w)


@matches("rms_norm.scale_then_cast", SCALE_CAST, X, W)
def torch_rms_norm(x, w):
    return torch.rms_norm(x, [64], w, 1e-5)


@matches("rms_norm.cast", SCALE_CAST.replace(",mul_weight:f32", "").replace(" weight=bf16", ""), X)
def functional_without_weight(x):
    return F.rms_norm(x, x.shape[-1:])


@matches("rms_norm", PLAIN, "f32[2,3,4,16]")
def functional_two_dims(x):
    return F.rms_norm(x, (4, 16))


@matches("rms_norm.scale", PLAIN + ",mul_weight:f32 weight=f32", "f32[2,3,4,16]", "f32[4,16]")
def functional_two_dims_weight(x, w):
    return F.rms_norm(x, (4, 16), w, 1e-6)


_module = torch.nn.RMSNorm(64).bfloat16().requires_grad_(False)


@matches("rms_norm.scale_then_cast", SCALE_CAST, X)
def module(x):
    return _module(x)


class _Eps(torch.nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


_float_eps, _zero_eps = _Eps(1e-5), _Eps(0.0)
_tensor_eps, _one_eps = _Eps(torch.tensor(1e-5)), _Eps(torch.full((1,), 1e-5))


@matches("rms_norm.cast_then_scale", LLAMA, X)
def eps_attribute(x):
    return _float_eps(x)


@matches("rms_norm.cast_then_scale", LLAMA, X, dynamic=True)
def eps_attribute_dynamic(x):
    return _float_eps(x)


@matches("rms_norm.cast_then_scale", LLAMA, X)
def eps_zero(x):
    return _zero_eps(x)


@matches("rms_norm.cast_then_scale", LLAMA, X)
def eps_tensor(x):
    return _tensor_eps(x)


@matches("rms_norm.cast_then_scale", LLAMA, X)
def eps_of_one_element(x):
    return _one_eps(x)


@matches("rms_norm.cast_then_scale", LLAMA, X, W, "f64[]")
def eps_input(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


NORM = "x=f32 row=sum:f32,sqrt:f32,{} element={}"


@matches("rms_norm", NORM.format("square:f32,div_n:f32,add_eps:f32,rsqrt:f32", "mul_row:f32"),
         "f32[4,64]", exact=False)  # fmt: skip
def norm_squared(x):
    n = x.norm(dim=-1, keepdim=True)
    return x * torch.rsqrt(n.pow(2) / 64 + 1e-6)


@matches("rms_norm.by_norm_clamped",
         NORM.format("mul_const(0.125):f32,clamp_eps:f32", "div_row:f32"), "f32[4,64]",
         exact=False)  # fmt: skip
def norm_clamped(x):
    length = torch.norm(x, dim=-1, keepdim=True) * 64**-0.5
    return x / length.clamp(min=1e-8)


@matches("rms_norm.clamped", PLAIN.replace("add_eps", "clamp_eps"), "f32[4,64]")
def maximum_of_tensor(x):
    least = torch.tensor(1e-6)
    return x * torch.rsqrt(torch.maximum(least, x.pow(2).mean(-1, keepdim=True)))


@matches("rms_norm.by_norm", NORM.format("mul_const(0.125):f32", "div_row:f32"), "f32[4,64]",
         exact=False)  # fmt: skip
def norm_over_root_length(x):
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 8.0)


@matches("rms_norm.by_norm", NORM.format("mul_const(0.125):f32", "div_row:f32"), "f32[4,64]",
         exact=False)  # fmt: skip
def norm_times_root_length(x):
    return x / (torch.linalg.norm(x, dim=-1, keepdim=True) * 64**-0.5)


@matches("rms_norm", PLAIN, "f32[2,8,128]")
def slice_written_twice(x):
    return x[..., :64] * torch.rsqrt(x[..., :64].pow(2).mean(-1, keepdim=True) + 1e-6)


@matches("rms_norm.cast_then_scale", LLAMA, "bf16[8,2,64]", W)
def transpose_written_three_times(x, w):
    mean = x.transpose(0, 1).float().pow(2).mean(-1, keepdim=True)
    out = x.transpose(0, 1).float() * torch.rsqrt(mean + 1e-6)
    return w * out.to(x.transpose(0, 1).dtype)


@matches("rms_norm", PLAIN, "f32[3,8,64]")
def selected_twice(x):
    return x[1] * torch.rsqrt(x[1].pow(2).mean(-1, keepdim=True) + 1e-6)


@matches("rms_norm.clamped", PLAIN.replace("add_eps", "clamp_eps"), "f32[4,64]")
def clamp_by_a_tensor(x):
    least = torch.tensor(1e-6)
    return x * torch.rsqrt(torch.clamp(x.pow(2).mean(-1, keepdim=True), min=least))
