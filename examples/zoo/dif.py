"""Build a tiny random diffusers transformer of a given class, and inputs for it.

Constructor arguments are shrunk by name; a class that needs more has a row in `CLASSES`. Inputs are
named in the row with their shapes: B is the batch, other letters are constructor arguments.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from zoo.dif_special import CLASSES, Maker
from zoo.hf import Built, spread_norm_weights

SHRINK = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "cross_attention_dim": 64,
    "pooled_projection_dim": 48,
    "text_dim": 64,
    "text_embed_dim": 64,
    "caption_channels": 64,
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
    maker = Maker(batch, dtype, torch.Generator().manual_seed(seed + 1), model)
    inputs = recipe.inputs(maker)
    if "return_dict" in inspect.signature(cls.forward).parameters:
        inputs["return_dict"] = False
    return Built(model, inputs)
