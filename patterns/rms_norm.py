"""RMSNorm: x / sqrt(mean(x*x) + eps) over the last dimensions.

Spellings of the mean and of the inverse are absorbed by words; those that round differently end
up as different steps of the spec.
"""

from __future__ import annotations

from fxpass.formula import Formula

FAMILIES = (
    Formula(
        "rms_norm",
        lambda p, x, eps: p.over_root(x, p.plus_eps(p.mean_square(x), eps)),
        "Llama, Qwen, Gemma, T5, nn.RMSNorm, F.rms_norm",
    ),
    Formula(
        "rms_norm.no_eps",
        lambda p, x: p.over_root(x, p.mean_square(x)),
        "eps=0 after constant folding",
    ),
    Formula(
        "rms_norm.clamped",
        lambda p, x, eps: p.over_root(x, p.at_least(p.mean_square(x), eps)),
        "mean of squares clamped to eps",
    ),
    Formula(
        "rms_norm.by_norm",
        lambda p, x: p.over(x, p.rms(x)),
        "x / (x.norm() / sqrt(N)), without eps",
    ),
    Formula(
        "rms_norm.by_norm_clamped",
        lambda p, x, eps: p.over(x, p.at_least(p.rms(x), eps)),
        "x / max(x.norm() / sqrt(N), eps) (lucidrains)",
    ),
    Formula(
        "rms_norm.weight_first",
        lambda p, x, w, eps: p.over_root(p.weight(w) * x, p.plus_eps(p.mean_square(x), eps)),
        "(w * x) * rsqrt(mean(x*x) + eps)",
    ),
)
