"""What the generic rules get wrong, per model type: configuration changes and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Changes = dict[str, Any]

WIDE_HEADS: Changes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128}
"""Rotary sections are fixed numbers for heads of 128."""
GLOBAL_HEADS: Changes = {"global_head_dim": 32}

SPECIAL: dict[str, Changes] = {
    "mamba2": {"num_heads": 8},
    "longcat_flash": {"head_dim": 32, "qk_head_dim": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen4_exp_text": {},
    **dict.fromkeys(
        ["glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text", "paddleocr_vl_text",
         "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen2_vl_text", "cosmos3_edge_text"],
        WIDE_HEADS,
    ),
    **dict.fromkeys(
        ["gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text"],
        GLOBAL_HEADS,
    ),
}  # fmt: skip

INPUTS: dict[str, Callable[..., dict[str, Any]]] = {}
