"""Make a tiny configuration out of the default one of any transformers model type.

Fields are shrunk by name: `RULES` says what each kind of field becomes. Values only ever get
smaller, lists with one entry per layer keep one entry of every kind, and token ids are moved into
the tiny vocabulary. What the rules get wrong for one type is put right in `special.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from zoo.special import SPECIAL

VOCAB = 512
MAX_KINDS = 6
"""At most this many layers, when the layers of a model are of several kinds."""

NAMES = {
    "hidden": """hidden_size d_model n_embd embed_dim hidden_dim dim model_dim embedding_size
        text_hidden_size encoder_hidden_size decoder_hidden_size backbone_hidden_size width
        projector_hidden_size out_hidden_size output_hidden_size projection_dim embedding_dim
        projector_input_dim projector_output_dim vision_output_dim audio_embed_dim d_text
        hidden_size_image text_embed_dim encoder_dim decoder_dim text_dim
        output_dim pooler_output_size mlp_hidden_size projector_intermediate_size""",
    "wide": """intermediate_size moe_intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim
        n_inner shared_expert_intermediate_size mlp_dim ffn_hidden_size intermediate_size_mlp
        shared_intermediate_size dense_intermediate_size expert_ffn_hidden_size block_ff_dim
        moe_shared_expert_intermediate_size expert_intermediate_size lru_width
        encoder_intermediate_size decoder_intermediate_size feed_forward_dim
        dense_ffn_hidden_size moe_hidden_size shared_ffn_hidden_size linear_units
        intermediate_dim""",
    "layers": """num_hidden_layers num_layers n_layer n_layers depth encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks layers encoder_num_hidden_layers
        decoder_num_hidden_layers n_blocks""",
    "heads": """num_attention_heads num_heads n_head n_heads encoder_attention_heads attention_heads
        decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads
        index_n_heads indexer_num_heads swa_num_attention_heads""",
    "groups": """num_key_value_heads n_kv_heads encoder_num_key_value_heads num_kv_heads
        decoder_num_key_value_heads num_global_key_value_heads swa_num_key_value_heads""",
    "head_dim": """head_dim d_kv kv_channels attention_head_dim v_head_dim qk_nope_head_dim
        global_head_dim qk_rope_head_dim index_head_dim swa_head_dim swa_v_head_dim head_size
        linear_key_head_dim linear_value_head_dim gdn_head_dim attn_head_dim dim_head
        qk_head_dim query_pre_attn_scalar""",
    "few_heads": """linear_num_key_heads linear_num_value_heads mamba_n_heads mamba_num_heads
        ssm_num_heads linear_num_heads linear_attn_num_heads""",
    "rank": """kv_lora_rank q_lora_rank o_lora_rank time_step_rank index_kv_lora_rank
        hidden_size_per_layer_input state_size ssm_state_size mamba_d_state mamba_state_dim""",
    "experts": """num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts
        num_routed_experts n_experts""",
    "top": """num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token
        n_shared_experts num_shared_experts topk_group moe_top_k""",
    "expert_groups": "n_group n_groups num_groups mamba_n_groups o_groups mamba_ngroups",
    "vocab": """vocab_size vocab_size_per_layer_input text_vocab_size
        codebook_size max_position_embeddings n_positions max_source_positions
        max_target_positions""",
    "window": "sliding_window attention_window attention_chunk_size mamba_chunk_size chunk_size",
    "image": "image_size img_size input_size",
}
SIZE = {
    "layers": 2, "heads": 4, "groups": 2, "rank": 32, "experts": 4, "top": 1,
    "few_heads": 4, "expert_groups": 1, "vocab": VOCAB, "window": 16, "image": 56,
}  # fmt: skip
KIND = {name: kind for kind, names in NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Size:
    """How small."""

    hidden: int = 128
    layers: int = 2

    def of(self, kind: str) -> int:
        """The largest value of a field of that kind."""
        sizes = {"hidden": self.hidden, "wide": 2 * self.hidden, "head_dim": self.hidden // 4}
        return {**SIZE, **sizes, "layers": self.layers}[kind]


def shrink(config: Any, size: Size, changes: dict[str, Any] | None = None) -> Any:
    """A tiny configuration of the same class; `changes` has the last word.

    Keys of `changes` with a dot go to a sub-configuration: "text_config.num_hidden_layers".
    """
    changes = {**SPECIAL.get(config.model_type, {}), **(changes or {})}
    new: dict[str, Any] = {}
    for key in getattr(type(config), "sub_configs", {}) or {}:
        below = {
            k.partition(".")[2]: changes.pop(k) for k in list(changes) if k.startswith(key + ".")
        }
        if (sub := getattr(config, key, None)) is not None and key not in changes:
            new[key] = shrink(sub, size, below)
    layers = [name for name in _names(config) if KIND.get(name) == "layers"]
    kinds = _layer_kinds(config, size, max((_get(config, n) or 0 for n in layers), default=0))
    for name in _names(config):
        if name not in new:
            new[name] = _field(name, _get(config, name), size, kinds)
    new.update(_attention(config, new))
    new = {key: value for key, value in new.items() if value is not KEEP}
    if "layer_types" in new:
        new.update({name: len(new["layer_types"]) for name in layers})
    return type(config)(**{**new, **changes})


KEEP = object()


def _get(config: Any, name: str) -> Any:
    """The plain value of a field; some properties refuse to answer for all layers at once."""
    return vars(config).get(name)


def _attention(config: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Head counts that were equal stay equal; what the class leaves open is filled in."""
    out: dict[str, Any] = {}
    names = _names(config)
    heads = new.get("num_attention_heads", KEEP)
    hidden = new.get("hidden_size", KEEP)
    if heads is KEEP or hidden is KEEP:
        return out
    groups = _get(config, "num_key_value_heads")
    if "num_key_value_heads" in names and groups in (None, _get(config, "num_attention_heads")):
        out["num_key_value_heads"] = heads
    if "head_dim" in names and _get(config, "head_dim") is None:
        out["head_dim"] = hidden // heads
    return out


def _names(config: Any) -> list[str]:
    """Fields that the class takes as arguments."""
    skip = {"transformers_version", "architectures", "id2label", "label2id", "dtype"}
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.init and field.name not in skip and not field.name.startswith("_")
    ]


def _field(name: str, value: Any, size: Size, kinds: list[int]) -> Any:
    if value is None or isinstance(value, bool):
        return KEEP
    per_layer = isinstance(value, (list, tuple)) and not name.endswith("_ids")
    if per_layer and kinds and len(value) > max(kinds):
        return type(value)(value[i] for i in kinds)
    if not isinstance(value, int):
        return KEEP
    if name.endswith(("token_id", "token_index")):
        return value if value < VOCAB else VOCAB - 1 - value % 64
    kind = KIND.get(name)
    return min(value, size.of(kind)) if kind else KEEP


def _layer_kinds(config: Any, size: Size, layers: int) -> list[int]:
    """Indices of layers to keep: at least `size.layers`, and one of every kind."""
    types = _get(config, "layer_types")
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        return []
    per_layer = [
        value
        for name in _names(config)
        if isinstance(value := _get(config, name), (list, tuple)) and len(value) == layers
    ]
    seen: dict[Any, int] = {}
    for index, kind in enumerate(zip(*per_layer, strict=True)):
        seen.setdefault(str(kind), index)
    chosen = sorted(seen.values())[:MAX_KINDS]
    spare = [index for index in range(layers) if index not in chosen]
    return sorted(chosen + spare[: max(0, size.layers - len(chosen))])
