"""One row per diffusers transformer class: the layout of its input and what the rules miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

TEXT = 64
"""Width of the text embeddings."""
TEXT_TOKENS = 8
IMAGE_TOKENS = 16


@dataclass
class Maker:
    """Makes input tensors of one batch size and dtype."""

    batch: int
    dtype: torch.dtype
    generator: torch.Generator
    channels: int
    axes: int = 3

    def randn(self, *shape: int) -> torch.Tensor:
        """Random values, with the batch in front."""
        return torch.randn(self.batch, *shape, generator=self.generator).to(self.dtype)

    def ids(self, tokens: int) -> torch.Tensor:
        """Positions for rotary embeddings, the same for the whole batch."""
        return torch.arange(tokens * self.axes).reshape(tokens, self.axes).float() % 7

    def ones(self, *shape: int) -> torch.Tensor:
        """An attention mask that hides nothing."""
        return torch.ones(self.batch, *shape, dtype=torch.bool)

    def pair(self, value: float) -> torch.Tensor:
        """Two numbers (a size, a crop) for each batch element."""
        return torch.full((self.batch, 2), value)

    def hidden(self, layout: str) -> torch.Tensor:
        """The noisy input: tokens, an image or a video."""
        if layout == "tokens":
            return self.randn(IMAGE_TOKENS, self.channels)
        return self.randn(self.channels, *((2, 8, 8) if layout == "video" else (8, 8)))


@dataclass
class Recipe:
    """How to build and call one class."""

    layout: str
    """tokens, image or video."""
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Maker], dict[str, Any]] = lambda make: {}
    """Inputs beyond `COMMON`."""
    axes: int = 3


COMMON: dict[str, Callable[[Maker], Any]] = {
    "encoder_hidden_states": lambda make: make.randn(TEXT_TOKENS, TEXT),
    "timestep": lambda make: torch.full((make.batch,), 500.0).to(make.dtype),
    "pooled_projections": lambda make: make.randn(48),
    "encoder_attention_mask": lambda make: make.ones(TEXT_TOKENS),
    "encoder_hidden_states_mask": lambda make: make.ones(TEXT_TOKENS),
    "img_ids": lambda make: make.ids(IMAGE_TOKENS),
    "txt_ids": lambda make: make.ids(TEXT_TOKENS),
    "guidance": lambda make: torch.full((make.batch,), 3.5).to(make.dtype),
    "img_shapes": lambda make: [(1, 4, 4)] * make.batch,
    "original_size": lambda make: make.pair(64.0),
    "target_size": lambda make: make.pair(64.0),
    "crop_coords": lambda make: make.pair(0.0),
}
"""Inputs by the name of the argument of `forward`."""

GRID = {"num_frames": 1, "height": 4, "width": 4}
SMALL_ROPE = {"rope_axes_dim": (16, 16)}

CLASSES: dict[str, Recipe] = {
    "FluxTransformer2DModel": Recipe("tokens", {"in_channels": 16}),
    "WanTransformer3DModel": Recipe("video"),
    "AceStepTransformer1DModel": Recipe(
        "tokens",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "in_channels": 48,
            "audio_acoustic_hidden_dim": 16,
            "encoder_hidden_size": TEXT,
        },
        lambda make: {
            "hidden_states": make.randn(IMAGE_TOKENS, 16),
            "context_latents": make.randn(IMAGE_TOKENS, 32),
            "timestep_r": torch.full((make.batch,), 500.0).to(make.dtype),
        },
    ),
    "AnyFlowTransformer3DModel": Recipe(
        "video",
        {},
        # frames come before channels
        lambda make: {
            "hidden_states": make.randn(2, 16, 8, 8),
            "r_timestep": torch.full((make.batch, 2), 400.0).to(make.dtype),
            "timestep": torch.full((make.batch, 2), 500.0).to(make.dtype),
        },
    ),
    "HeliosTransformer3DModel": Recipe("video", {"rope_dim": (8, 12, 12)}),
    "PRXTransformer2DModel": Recipe(
        "image",
        {
            "context_in_dim": TEXT,
            "hidden_size": 128,
            "num_heads": 4,
            "depth": 2,
            "axes_dim": [16, 16],
        },
    ),
    "AuraFlowTransformer2DModel": Recipe(
        "image", {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": 128}
    ),
    "BriaFiboTransformer2DModel": Recipe(
        "tokens",
        {"in_channels": 16, "text_encoder_dim": 32},
        lambda make: {"text_encoder_layers": [make.randn(TEXT_TOKENS, 32) for _ in range(4)]},
    ),
    "BriaTransformer2DModel": Recipe("tokens", {"in_channels": 16}),
    "ChromaTransformer2DModel": Recipe(
        "tokens",
        {"in_channels": 16, "approximator_num_channels": 32, "approximator_hidden_dim": 64},
        lambda make: {"attention_mask": make.ones(TEXT_TOKENS + IMAGE_TOKENS)},
    ),
    "ChronoEditTransformer3DModel": Recipe("video"),
    "CogView4Transformer2DModel": Recipe("image", {"rope_axes_dim": (16, 16)}),
    "ErnieImageTransformer2DModel": Recipe(
        "image",
        {
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": TEXT,
        },
        lambda make: {
            "text_bth": make.randn(TEXT_TOKENS, TEXT),
            "text_lens": torch.full((make.batch,), TEXT_TOKENS),
        },
    ),
    "Flux2Transformer2DModel": Recipe(
        "tokens", {"in_channels": 16, "axes_dims_rope": (8, 8, 8, 8)}, axes=4
    ),
    "HunyuanImageTransformer2DModel": Recipe(
        "image",
        {"in_channels": 4, "out_channels": 4, "rope_axes_dim": (16, 16), "patch_size": (2, 2)},
    ),
    "HunyuanVideoTransformer3DModel": Recipe("video"),
    "LTXVideoTransformer3DModel": Recipe("tokens", {"cross_attention_dim": 128}, lambda make: GRID),
    "Lumina2Transformer2DModel": Recipe(
        "image",
        {"hidden_size": 128, "num_kv_heads": 2, "axes_dim_rope": (8, 12, 12), "cap_feat_dim": TEXT},
    ),
    "LongCatImageTransformer2DModel": Recipe("tokens", {"in_channels": 16}),
    "MochiTransformer3DModel": Recipe("video"),
    "NucleusMoEImageTransformer2DModel": Recipe("tokens", {"in_channels": 16}),
    "OvisImageTransformer2DModel": Recipe("tokens", {"in_channels": 16}),
    "QwenImageTransformer2DModel": Recipe("tokens", {"in_channels": 16, "out_channels": 4}),
    "SD3Transformer2DModel": Recipe(
        "image", {"caption_projection_dim": 128, "pos_embed_max_size": 16, "qk_norm": "rms_norm"}
    ),
    "SanaTransformer2DModel": Recipe(
        "image",
        {
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 128,
            "qk_norm": "rms_norm_across_heads",
        },
    ),
    "SkyReelsV2Transformer3DModel": Recipe("video"),
    "WanVACETransformer3DModel": Recipe(
        "video",
        {"vace_layers": [0]},
        lambda make: {"control_hidden_states": make.randn(96, 2, 8, 8)},
    ),
    "ZImageTransformer2DModel": Recipe(
        "image",
        {
            "dim": 128,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": TEXT,
            "axes_dims": [8, 12, 12],
        },
        lambda make: {
            "x": [make.randn(16, 1, 8, 8)[0] for _ in range(make.batch)],
            "t": torch.full((make.batch,), 0.5).to(make.dtype),
            "cap_feats": [make.randn(TEXT_TOKENS, TEXT)[0] for _ in range(make.batch)],
        },
    ),
}
