"""L2 norm: x at unit Euclidean length. The kernels are RMSNorm's, with sum in place of mean."""

from __future__ import annotations

from fxpass.formula import Formula

FAMILIES = (
    Formula(
        "l2_norm",
        lambda p, x, eps: p.over_root(x, p.plus_eps(p.sum_square(x), eps)),
        "q/k norm of linear attention (Qwen3-Next, OLMo hybrid)",
    ),
    Formula(
        "l2_norm.no_eps",
        lambda p, x: p.over_root(x, p.sum_square(x)),
        "x / x.norm() (AIMv2)",
    ),
    Formula(
        "l2_norm.normalize",
        lambda p, x, eps: p.over(x, p.at_least(p.norm(x), eps)),
        "F.normalize: x / max(norm(x), eps)",
    ),
    Formula(
        "l2_norm.clamped",
        lambda p, x, eps: p.over_root(x, p.at_least(p.sum_square(x), eps)),
        "x * rsqrt(max(sum(x*x), eps))",
    ),
)
