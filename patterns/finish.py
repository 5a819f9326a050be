"""How a norm ends: what happens to the normalised value u before it leaves the subgraph.

Variants differ in where the weight meets the rounding back to x's dtype. That changes results, so
it is part of the meaning.
"""

from __future__ import annotations

from fxpass.formula import Formula

FINISHES = (
    Formula("", lambda p, u: u, "no weight, nothing rounded"),
    Formula("cast", lambda p, u: p.cast(u), "no weight"),
    Formula("scale", lambda p, u, w: u * p.weight(w), "one dtype throughout"),
    Formula("cast_then_scale", lambda p, u, w: p.cast(u) * p.weight(w), "Llama, Qwen, T5"),
    Formula(
        "scale_then_cast",
        lambda p, u, w: p.cast(u * p.weight(w)),
        "nn.RMSNorm, GPT-OSS, Gemma (1 + w)",
    ),
    Formula(
        "cast_then_scale_then_cast",
        lambda p, u, w: p.cast(p.cast(u) * p.weight(w)),
        "Llama order with a float32 weight, cast back",
    ),
    Formula("scale_bias", lambda p, u, w, b: u * p.weight(w) + b, "with bias"),
    Formula("cast_then_scale_bias", lambda p, u, w, b: p.cast(u) * p.weight(w) + b, "with bias"),
    Formula(
        "scale_then_cast_bias", lambda p, u, w, b: p.cast(u * p.weight(w)) + b, "with bias after"
    ),
    Formula(
        "scale_bias_then_cast", lambda p, u, w, b: p.cast(u * p.weight(w) + b), "with bias before"
    ),
)
