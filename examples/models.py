"""The models of the demo: what to build and which of their norms to look at closely.

Every model is tiny (two layers, hidden 256), random and bfloat16; nothing is downloaded. A site
names one norm module; `residual` says that the model adds a residual right before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoo import dif, hf
from zoo.shrink import Size

HIDDEN = 256


@dataclass(frozen=True)
class Site:
    """A norm module of a model."""

    name: str
    residual: bool = False


@dataclass(frozen=True)
class Demo:
    """One row of the demo."""

    make: Callable[..., Any]
    """Builds the model with inputs; takes `batch`."""
    sites: tuple[Site, ...]


def _hf(model_type: str, *sites: Site) -> Demo:
    return Demo(partial(hf.build, model_type, Size(hidden=HIDDEN)), sites)


def _dif(name: str, *sites: Site, **changes: Any) -> Demo:
    return Demo(partial(dif.build, name, **changes), sites)


DECODER = Site("layers.1.input_layernorm", residual=True)

CORE: dict[str, Demo] = {
    "Llama": _hf("llama", DECODER),
    "Qwen3": _hf("qwen3", DECODER, Site("layers.1.self_attn.q_norm")),
    "Gemma 3": _hf("gemma3_text", DECODER, Site("layers.1.post_attention_layernorm")),
    "Flux": _dif(
        "FluxTransformer2DModel",
        Site("transformer_blocks.0.attn.norm_q"),
        num_layers=1,
        num_single_layers=1,
    ),
}
"""What `make demo` runs."""

MORE: dict[str, Demo] = {
    "Wan": _dif("WanTransformer3DModel", Site("blocks.1.attn1.norm_q")),
    "OLMo 2": _hf("olmo2", Site("layers.1.post_attention_layernorm")),
    "Mixtral": _hf("mixtral", DECODER),
    "T5": _hf("t5", Site("encoder.block.1.layer.0.layer_norm", residual=True)),
    "Mamba-2": _hf("mamba2", Site("layers.1.norm", residual=True)),
    "Llama 4": _hf("llama4_text", DECODER),
    "DeepSeek-V3": _hf("deepseek_v3", DECODER, Site("layers.1.self_attn.kv_a_layernorm")),
    "DeepSeek-V4": _hf("deepseek_v4", DECODER),
}
"""What `ALL=1 make demo` adds."""
