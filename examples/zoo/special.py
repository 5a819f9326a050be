"""What the generic rules get wrong, per model type: configuration changes and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Changes = dict[str, Any]

WIDE_HEADS: Changes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128}
"""Rotary sections are fixed numbers for heads of 128."""
HEADS_OF_64: Changes = {**WIDE_HEADS, "head_dim": 64}
GLOBAL_HEADS: Changes = {"global_head_dim": 32}

SPECIAL: dict[str, Changes] = {
    "mamba2": {"num_heads": 8},
    "longcat_flash": {"head_dim": 32, "qk_head_dim": 64, "n_routed_experts": 8,
                      "zero_expert_num": 2, "moe_topk": 2},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
        "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1,
                    "num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
              "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "step3p5": {"sliding_window": 16},
    "step3p7_text": {"sliding_window": 16},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [4, 4, 4, 4]}},
    **dict.fromkeys(
        ["glm4v_moe_text", "paddleocr_vl_text",
         "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen2_vl_text", "cosmos3_edge_text"],
        WIDE_HEADS,
    ),
    **dict.fromkeys(["glm4v_text", "glm_image_text", "glm_ocr_text"], HEADS_OF_64),
    **dict.fromkeys(
        ["gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text"],
        GLOBAL_HEADS,
    ),
}  # fmt: skip


def timesfm(
    model: Any, batch: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """Time series, their padding and their frequency class."""
    past = torch.randn(batch, 128, generator=generator).to(dtype)
    return {
        "past_values": past,
        "past_values_padding": torch.zeros(batch, 128, dtype=torch.long),
        "freq": torch.zeros(batch, 1, dtype=torch.long),
    }


INPUTS: dict[str, Callable[..., dict[str, Any]]] = {"timesfm": timesfm}

FLOAT32 = frozenset({"inkling2", "inkling2_text", "timesfm", "xlstm"})
"""Types that mix in float32 tensors of their own and fail when built in bfloat16."""
