"""Build a tiny random diffusers transformer of a given class, and inputs for it.

Constructor arguments are shrunk by name; a class that needs more has a row in `CLASSES`. Inputs are
made by the names of the arguments of `forward`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from zoo.dif_special import CLASSES, COMMON, TEXT, Maker, Recipe
from zoo.hf import Built, spread_norm_weights

SHRINK = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": TEXT,
    "cross_attention_dim": TEXT,
    "pooled_projection_dim": 48,
    "text_dim": TEXT,
    "text_embed_dim": TEXT,
    "caption_channels": TEXT,
    "freq_dim": 32,
    "ffn_dim": 256,
    "axes_dims_rope": (8, 12, 12),
    "rope_axes_dim": (8, 12, 12),
    "sample_size": 16,
}
"""Constructor arguments and their tiny values, used where the class has an argument of the name."""


def build(
    name: str,
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes: Any,
) -> Built:
    """A transformer class of diffusers, with inputs."""
    import diffusers.models.transformers as transformers

    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    recipe = CLASSES[name]
    known = inspect.signature(cls.__init__).parameters
    arguments = {key: value for key, value in SHRINK.items() if key in known}
    arguments.update({**recipe.arguments, **changes})
    model = cls(**arguments).to(dtype).eval()
    spread_norm_weights(model, seed)
    return Built(model, _inputs(model, recipe, batch, dtype, seed))


def _inputs(
    model: Any, recipe: Recipe, batch: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """What `forward` needs, from the common table and the class's own."""
    names = inspect.signature(model.forward).parameters
    channels = getattr(model.config, "in_channels", 16)
    generator = torch.Generator().manual_seed(seed + 1)
    make = Maker(batch, dtype, generator, channels, recipe.axes)
    inputs = {name: maker(make) for name, maker in COMMON.items() if name in names}
    if not getattr(model.config, "guidance_embeds", False):
        inputs.pop("guidance", None)
    if "hidden_states" in names:
        inputs["hidden_states"] = make.hidden(recipe.layout)
    inputs.update(recipe.inputs(make))
    if "return_dict" in names:
        inputs["return_dict"] = False
    return inputs
