"""Build a tiny random transformers model of a given type, and inputs for it.

Nothing is downloaded: the configuration is the class's default one, shrunk. Weights are random;
every norm weight is moved away from its initial value, so that rounding orders can be told apart.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from zoo.shrink import VOCAB, Size, shrink
from zoo.special import FLOAT32, INPUTS


@dataclass
class Built:
    """A model with the inputs of one call."""

    model: torch.nn.Module
    inputs: dict[str, Any]

    def __call__(self) -> Any:
        """Run it once in eager."""
        with torch.no_grad():
            return self.model(**self.inputs)


def build(
    model_type: str,
    size: Size = Size(),  # noqa: B008 (frozen)
    batch: int = 2,
    tokens: int = 24,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Built:
    """The base model (`AutoModel`) of a type, with inputs."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    dtype = torch.float32 if model_type in FLOAT32 else dtype
    config = shrink(CONFIG_MAPPING[model_type](), size)
    model = _model_class(config)._from_config(config, dtype=dtype)
    spread_norm_weights(model, seed)
    return Built(model.eval(), make_inputs(model, model_type, batch, tokens, dtype, seed))


def _model_class(config: Any) -> Any:
    """The base model of a configuration, also where `AutoModel` does not know the type."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (list, tuple)) else found
    name = type(config).__module__.replace("configuration_", "modeling_")
    classes = vars(importlib.import_module(name)).values()
    return next(
        found
        for found in classes
        if isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and found.config_class is type(config)
        and not found.__name__.endswith("PreTrainedModel")
    )


def spread_norm_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every one-dimensional weight random values near its initial ones.

    Weights that start at 1 become uniform in [0.5, 1.5]; those that start at 0 (Gemma's 1 + w)
    uniform in [-0.5, 0.5]. Biases keep their values.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        start = parameter.detach().flatten()[:1].float().cpu()
        constant = bool((parameter == start.to(parameter)).all())
        norm = "norm" in name.lower() or "scale" in name.lower() or "layernorm" in name.lower()
        if parameter.dim() > 1 or not constant or not norm or name.endswith("bias"):
            continue
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        parameter.data.copy_((start.item() + noise).to(parameter.dtype))


def make_inputs(
    model: torch.nn.Module, model_type: str, batch: int, tokens: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Arguments for `forward`: from the special table, else from the model's main input."""
    generator = torch.Generator().manual_seed(seed + 1)
    special = INPUTS.get(model_type)
    if special is not None:
        return special(model, batch, tokens, dtype, generator)
    config, main = model.config, model.main_input_name
    names = inspect.signature(model.forward).parameters
    if any(name in names for name in ("grid_thw", "image_grid_thw")) and "input_ids" not in names:
        return _packed_patches(names, config, dtype, generator)
    if "input_ids" in names:
        main = "input_ids"
    ids = torch.randint(3, VOCAB - 80, (batch, tokens), generator=generator)
    made: dict[str, Any] = {main: _main_input(main, config, ids, batch, dtype, generator)}
    if "decoder_input_ids" in names:
        made["decoder_input_ids"] = ids[:, : tokens // 2]
    if "use_cache" in names or "input_ids" in names:
        made["use_cache"] = False
    return made


def _packed_patches(names: Any, config: Any, dtype: torch.dtype, generator: Any) -> dict[str, Any]:
    """Vision towers that take one flat list of patches and the grid they came from."""
    side, frames = config.patch_size, getattr(config, "temporal_patch_size", 1)
    side = side[0] if isinstance(side, (list, tuple)) else side
    frames = frames[0] if isinstance(frames, (list, tuple)) else frames
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    patches = torch.randn(64, channels * frames * side * side, generator=generator).to(dtype)
    grid = "grid_thw" if "grid_thw" in names else "image_grid_thw"
    made = {grid: torch.tensor([[1, 8, 8]])}
    first = next(name for name in names if name in ("hidden_states", "pixel_values"))
    return {**made, first: patches}


def _main_input(
    main: str, config: Any, ids: torch.Tensor, batch: int, dtype: torch.dtype, generator: Any
) -> torch.Tensor:
    if main == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 56)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
        return torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    if main == "input_features":
        config = getattr(config, "audio_config", config)
        bins = getattr(config, "num_mel_bins", 80)
        return torch.randn(batch, bins, 200, generator=generator).to(dtype)
    if main == "input_values":
        return torch.randn(batch, 1, 4096, generator=generator).to(dtype)
    return ids
