"""Which operators may follow the number of rows, why, and what the mode does about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import torch_watch
from fxpass.invariant import source
from fxpass.invariant.table import COMPOSITES, CPU_POINTWISE, CUSTOM, LEAVES
from fxpass.kernels.invariant import dispatch


@dataclass(frozen=True)
class Family:
    """Operators that may follow the rows for one reason."""

    name: str
    why: str
    uncovered: str
    """Why the mode leaves one of them as it is."""


PRODUCT = Family(
    "product",
    "the library picks tiles and splits of the sum by the number of rows",
    "no invariant kernel for this overload or dtype",
)
REDUCTION = Family(
    "reduction",
    "how a sum is split over threads and vectors may follow the shape",
    "no invariant kernel for this overload or dtype",
)
ATTENTION = Family(
    "attention",
    "keys are split over blocks by batch and length",
    "no invariant kernel for this overload or dtype",
)
POINTWISE = Family(
    "element-wise",
    "the CPU's vectors and their tails round differently, so bits follow an element's place",
    "torch's kernel is used",
)
GENERATED = Family(
    "generated element-wise",
    "what Inductor computes in whole vectors, and what is left over, may use two functions",
    "Inductor's own code; prove the model compiled",
)
CONVOLUTION = Family(
    "convolution",
    "cuDNN and oneDNN pick an algorithm by shape",
    "no invariant kernel for this overload or dtype",
)
RECURRENT = Family(
    "recurrent",
    "its products are inside one library call",
    "replaced in eager code only; prove the model",
)
SCATTER = Family(
    "scatter",
    "writes to one place are added in the order they come",
    "torch.use_deterministic_algorithms(True) fixes the order on GPUs",
)
TRANSFORM = Family(
    "linear algebra",
    "the library picks an algorithm by batch",
    "only triangular systems in float32 and float64 are replaced; prove the model",
)
MIXING = Family("mixes rows", "the result is made of all rows", "mixes rows by its meaning")
RANDOM = Family(
    "random",
    "numbers are drawn by position in the batch",
    "draw with one generator per row",
)
COLLECTIVE = Family(
    "collective",
    "NCCL picks algorithm, protocol and channels by size, and each adds in another order",
    "fxpass.invariant.collectives.pin() before init_process_group; sizes in multiples of 16 bytes",
)
REDUCE_SCATTER = Family(
    "reduce-scatter",
    "the rank an element goes to decides the order of its sum",
    "no setting helps; use all-to-all and a sum in a fixed order",
)
CUSTOM_REDUCE = Family(
    "custom all-reduce",
    "one-shot and two-shot kernels are chosen by size",
    "out of reach; switch it off in the serving stack",
)
FUSED_REDUCE = Family(
    "fused all-reduce",
    "summed over ranks, and fused with other work, by a choice that follows the size",
    "out of reach; switch the fusion off in the serving stack",
)
FLEX = Family(
    "flex_attention",
    "its generated kernel splits keys and picks block sizes by shape",
    "out of reach; F.scaled_dot_product_attention is replaced",
)
OPAQUE = Family(
    "custom operator",
    "its kernel is not known",
    "out of reach; prove the model",
)
SERVING = Family(
    "serving stack's kernel",
    "serving stacks pick kernels by the number of rows",
    "out of reach; see the stack's own batch-invariant switch",
)

_MEASURABLE = (
    PRODUCT, REDUCTION, ATTENTION, POINTWISE, CONVOLUTION, RECURRENT, SCATTER, TRANSFORM, OPAQUE,
    SERVING,
)  # fmt: skip

_REPLACED = (PRODUCT, REDUCTION, ATTENTION, CONVOLUTION, RECURRENT, TRANSFORM, POINTWISE)

_BY_NAME: dict[str, Family] = {
    **dict.fromkeys(
        """mm addmm bmm baddbmm addbmm mv addmv dot vdot _addmm_activation linear matmul
        mkldnn_linear
        _scaled_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2
        _weight_int4pack_mm _weight_int8pack_mm _sparse_semi_structured_mm inner outer_product
        addr _trilinear _linear_pointwise""".split(),
        PRODUCT,
    ),
    **dict.fromkeys(
        """sum nansum mean linalg_vector_norm norm logsumexp _softmax _log_softmax softmax
        log_softmax cumsum cumprod prod var std var_mean std_mean native_layer_norm
        _fused_rms_norm rms_norm native_group_norm _weight_norm_interface _logcumsumexp renorm dist
        trace _cdist_forward _pdist_forward cosine_similarity _safe_softmax
        _masked_softmax""".split(),
        REDUCTION,
    ),
    **dict.fromkeys(
        """_flash_attention_forward _efficient_attention_forward _cudnn_attention_forward
        scaled_dot_product_attention _fused_sdp_choice_attention""".split(),
        ATTENTION,
    ),
    **dict.fromkeys(
        """convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution
        miopen_convolution _slow_conv2d_forward slow_conv3d_forward conv_depthwise3d
        _conv_depthwise2d _convolution_pointwise convolution_backward conv_tbc
        slow_conv_transpose2d slow_conv_transpose3d slow_conv_dilated2d slow_conv_dilated3d
        cudnn_convolution_transpose cudnn_convolution_relu cudnn_convolution_add_relu
        miopen_convolution_transpose miopen_depthwise_convolution _nnpack_spatial_convolution
        _convolution_double_backward""".split(),
        CONVOLUTION,
    ),
    **dict.fromkeys(
        """lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _cudnn_rnn _thnn_fused_lstm_cell
        _thnn_fused_gru_cell""".split(),
        RECURRENT,
    ),
    **dict.fromkeys(
        """scatter_add scatter_reduce index_add index_reduce put _embedding_bag
        _embedding_bag_forward_only segment_reduce bincount histc""".split(),
        SCATTER,
    ),
    **dict.fromkeys("triangular_solve cholesky_solve lu_solve".split(), TRANSFORM),
    **dict.fromkeys("nonzero unique_dim _unique2 masked_select".split(), MIXING),
}
_BATCH_NORMS = {
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
}
"""Batch norms and where they are told to train."""
_ALWAYS_TRAINING = ("_batch_norm_with_update",)

_SERVING = """vllm vllm_ir _C _C_cache_ops _moe_C _vllm_fa2_C _vllm_fa3_C sglang sgl_kernel
flashinfer flash_attn flash_attn_3 aiter auto_deploy trtllm tensorrt_llm xformers deep_gemm
fbgemm quack""".split()
_OURS = ("fxpass",)
_TORCHS = ("aten", "prims", "prim", "_quantized", "quantized", "mkldnn", "onednn", "inductor",
           "rngprims", "profiler", "debugprims", "bitwise")  # fmt: skip
_C10D = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem", "_dtensor")


def of(operator: Any, args: Sequence[Any], values: Sequence[torch.Tensor]) -> Family | None:
    """The family of a call, or None if its rows cannot follow others.

    `args` are the call's arguments, `values` its tensors (or fake ones).
    """
    full = source.name_of(operator)
    space, _, name = full.rpartition(".")
    plain = _plain(name)
    if not torch_watch.is_overload(operator):
        return FLEX if "flex_attention" in full else None
    reduce = _reduces(space, plain)
    if reduce is not None or space in _C10D:
        return reduce
    if space not in _TORCHS:
        if space in _OURS:
            return None
        if _key(operator) in CUSTOM:
            return PRODUCT
        return SERVING if space in _SERVING else OPAQUE
    if torch.Tag.nondeterministic_seeded in operator.tags and "scaled_dot" not in plain:
        return RANDOM
    if _key(operator) in CPU_POINTWISE:
        on_cpu = any(v.device.type == "cpu" and _rounds(v) for v in values)
        return POINTWISE if on_cpu else None
    return _of_torch(plain, args, values)


_GENERATED = ("aten.log1p",)
"""Element-wise operators of which Inductor's CPU code was seen to follow an element's place."""


def of_generated(
    operator: Any, args: Sequence[Any], values: Sequence[torch.Tensor]
) -> Family | None:
    """The family of a node of a graph that Inductor compiles: element-wise code is its own."""
    found = of(operator, args, values)
    if found is not None and found is not POINTWISE:
        return found
    on_cpu = any(v.device.type == "cpu" and v.is_floating_point() for v in values)
    return GENERATED if on_cpu and source.name_of(operator) in _GENERATED else None


def _of_torch(plain: str, args: Sequence[Any], values: Sequence[torch.Tensor]) -> Family | None:
    if plain in _ALWAYS_TRAINING or plain in _BATCH_NORMS:
        at = _BATCH_NORMS.get(plain)
        training = at is None or (len(args) > at and args[at] is True)
        return MIXING if training else None
    if plain in ("index_put", "_unsafe_index_put", "_index_put_impl"):
        return SCATTER if len(args) > 3 and args[3] is True else None
    if plain.startswith(("_fft_", "linalg_")) and plain not in _BY_NAME:
        return TRANSFORM
    found = _BY_NAME.get(plain) or (ATTENTION if plain.startswith("_scaled_dot_product_") else None)
    if found in (PRODUCT, REDUCTION) and not any(_rounds(value) for value in values):
        return None  # integers: exact in any order
    return found


def _reduces(space: str, plain: str) -> Family | None:
    """For what sums over ranks."""
    joined = plain.replace("_", "")
    sums = "allreduce" in joined or "reducescatter" in joined
    if not sums:
        return None
    if any(word in joined for word in ("norm", "fus", "matmul", "quant")):
        return FUSED_REDUCE
    if "reducescatter" in joined:
        return REDUCE_SCATTER
    if space in _C10D:
        return CUSTOM_REDUCE if space == "symm_mem" else COLLECTIVE
    return CUSTOM_REDUCE


def _plain(name: str) -> str:
    """`sum` for `sum`, `sum.dim_IntList`; `add` for `add_`."""
    name = name.partition(".")[0]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _rounds(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def is_measurable(family: Family, operator: Any) -> bool:
    """Whether a call may be run again on fewer rows: not what talks to others or writes."""
    mutable = getattr(getattr(operator, "_schema", None), "is_mutable", True)
    return family in _MEASURABLE and not (mutable and family in (OPAQUE, SERVING))


def mode_does(
    family: Family, operator: Any, values: Sequence[torch.Tensor], eager: bool = False
) -> str:
    """What the mode does about a call of a family: `replaced` or why not.

    eager: it was seen in eager code, as a part of what the mode replaces whole (recurrent layers).
    """
    if family in _REPLACED:
        key = _key(operator)
        device = next((v.device.type for v in values), "cpu")
        floats = [v for v in values if _rounds(v)]
        product = family in (PRODUCT, ATTENTION, CONVOLUTION, RECURRENT)
        fits = bool(floats) and all(dispatch.takes(v, product) for v in floats)
        if family is TRANSFORM:
            fits = fits and all(v.dtype in (torch.float32, torch.float64) for v in floats)
        known = {**LEAVES, **COMPOSITES, **CUSTOM, **(CPU_POINTWISE if device == "cpu" else {})}
        if fits and (key in known or (eager and family is RECURRENT)):
            return "replaced"
    return f"not covered: {family.uncovered}"


def _key(operator: Any) -> str:
    """The name an overload has in the table of replacements."""
    return str(operator).removeprefix("aten.").removesuffix(".default")
