"""Hugging Face models by type or configuration file, with random weights and no download.

Sizes stay those of the configuration, so that the norms are the real ones; what is cut by default
is repetition: layers (one of every kind is kept), experts and the vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from fxpass.target_errors import TargetError, said

LAYERS = 4
ROWS, TOKENS = 2, 16
_LAYER_COUNTS = frozenset(
    """num_hidden_layers num_layers n_layer n_layers depth encoder_layers decoder_layers
    num_encoder_layers num_decoder_layers num_blocks n_blocks""".split()
)
_EXPERTS = frozenset("num_experts n_routed_experts num_local_experts moe_num_experts".split())
_CHOSEN = frozenset(
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts".split()
)
"""Experts of a token."""
_VOCABULARY = frozenset("vocab_size vocab_size_per_layer_input text_vocab_size".split())
_MOST = {
    **dict.fromkeys(_LAYER_COUNTS, LAYERS),
    **dict.fromkeys(_EXPERTS, 8),
    **dict.fromkeys(_VOCABULARY, 1024),
}


def load(text: str) -> tuple[Any, dict[str, Any]]:
    """The base model of `hf:TYPE[@full]` or `hf:config.json[@full]`, with keyword arguments.

    Weights are made on whatever tensors are in force: fake ones cost nothing.
    """
    name, _, size = text.removeprefix("hf:").partition("@")
    if size not in ("", "full"):
        raise TargetError(f"TARGET {text}: size {size!r} is unknown; use @full or nothing")
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        hint = "pip install 'fxpass[models]'"
        raise TargetError(f"TARGET {text}: transformers is not installed; {hint}") from error
    config = _config(text, name)
    try:
        if size != "full":
            config = shrunk(config)
        model = _model_class(config)._from_config(config, dtype=torch.bfloat16).eval()
        return model, inputs(model)
    except Exception as error:
        raise TargetError(f"TARGET {text}: {said(error, 'building the model')}") from error


def _config(text: str, name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = sorted(CONFIG_MAPPING)
    if name in known:
        return CONFIG_MAPPING[name]()
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean hf:{' or hf:'.join(near)}?" if near else "needs one or the other"
        raise TargetError(f"TARGET {text}: no model type and no file {name!r}; {hint}")
    try:
        data = json.loads(path.read_text())
        kind = data["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"TARGET {text}: {path} is no config.json with a model_type") from error
    if kind not in known:
        raise TargetError(
            f"TARGET {text}: model_type {kind!r} is unknown to the installed transformers;"
            " write a function that returns (model, args) instead"
        )
    return CONFIG_MAPPING[kind].from_dict(data)


def shrunk(config: Any) -> Any:
    """A configuration of the same class with few layers, but one of every kind."""
    new: dict[str, Any] = {}
    for name in getattr(type(config), "sub_configs", {}) or {}:
        sub = getattr(config, name, None)
        if sub is not None:
            new[name] = shrunk(sub)
    kept = _kept_layers(config)
    layers = max(
        (v for n, v in vars(config).items() if n in _LAYER_COUNTS and _is_count(v)), default=0
    )
    for name in _arguments(config):
        value = vars(config).get(name)
        if name in new or value is None:
            continue
        new[name] = _cut(name, value, layers, kept)
        if name in _EXPERTS and _is_count(value):
            new[name] = min(value, max(new[name], _experts_needed(config)))
    return type(config)(**new)


def _experts_needed(config: Any) -> int:
    """Fewest experts that a router can choose from: those of a token, two in each of its groups."""
    chosen = max((v for n, v in vars(config).items() if n in _CHOSEN and _is_count(v)), default=0)
    return max(chosen, 2 * (vars(config).get("n_group") or 0))


def _cut(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    """One field: a count, a list with one entry per layer, a token id, or anything else."""
    if isinstance(value, (list, tuple)) and kept and len(value) == layers:
        return type(value)(value[index] for index in kept)
    if not _is_count(value):
        return value
    if name.endswith(("token_id", "token_index")):
        return min(value, _MOST["vocab_size"] - 1)
    if name in _LAYER_COUNTS and kept:
        return min(value, len(kept))
    return min(value, _MOST.get(name, value))


def _kept_layers(config: Any) -> list[int]:
    """Indices of the layers to keep, where the configuration says what kind each is."""
    types = vars(config).get("layer_types")
    if not isinstance(types, (list, tuple)):
        return []
    first = sorted({types.index(kind) for kind in types})
    spare = [index for index in range(len(types)) if index not in first]
    return sorted(first + spare[: max(0, LAYERS - len(first))])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _arguments(config: Any) -> list[str]:
    """Fields that the class takes as arguments."""
    skip = {"transformers_version", "architectures", "id2label", "label2id", "dtype"}
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    names = [f.name for f in fields if f.init] or list(inspect.signature(type(config)).parameters)
    return [name for name in names if name not in skip and not name.startswith("_")]


def _model_class(config: Any) -> Any:
    """The base model of a configuration, also where `AutoModel` does not know the type."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (list, tuple)) else found
    name = type(config).__module__.replace("configuration_", "modeling_")
    for found in vars(importlib.import_module(name)).values():
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            continue
        if found.config_class is type(config) and not found.__name__.endswith("PreTrainedModel"):
            return found
    raise LookupError(f"{type(config).__name__} has no model class")


def inputs(model: Any) -> dict[str, Any]:
    """Arguments for one call of `forward`, from its main input."""
    names = inspect.signature(model.forward).parameters
    main = "input_ids" if "input_ids" in names else model.main_input_name
    made: dict[str, Any] = {main: _main_input(main, model.config)}
    if "decoder_input_ids" in names:
        made["decoder_input_ids"] = torch.ones(ROWS, TOKENS, dtype=torch.long)
    if "use_cache" in names:
        made["use_cache"] = False
    return made


def _main_input(main: str, config: Any) -> torch.Tensor:
    if main == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", None) or 3
        return torch.zeros(ROWS, channels, height, width, dtype=torch.bfloat16)
    if main == "input_features":
        config = getattr(config, "audio_config", config)
        bins = getattr(config, "num_mel_bins", 80)
        length = 2 * getattr(config, "max_source_positions", 100)
        return torch.zeros(ROWS, bins, length, dtype=torch.bfloat16)
    if main == "input_values":
        return torch.zeros(ROWS, 16000, dtype=torch.bfloat16)
    return torch.ones(ROWS, TOKENS, dtype=torch.long)
