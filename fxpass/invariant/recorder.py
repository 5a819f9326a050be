"""Lists every operator that reaches a kernel whose rows are not known to be invariant.

    with batch_invariant_mode(), Recorder() as found:
        model(x)
    assert not found.unknown

Known are: what the mode replaces (unless it left a call to torch), views, element-wise operators
(torch tags them) and the ones in `EXACT`, which move, compare or draw numbers, or add integers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import torch_watch
from fxpass.invariant import mode, source
from fxpass.invariant.aten import NARROW
from fxpass.invariant.table import COMPOSITES, CPU_POINTWISE, LEAVES

EXACT = frozenset(
    """all amax amin aminmax any arange argmax argmin argsort as_strided_ bernoulli bincount
    broadcast_tensors bucketize cat clone constant_pad_nd copy_ copy count_nonzero cummax
    cummin detach_ detach diag_embed embedding empty empty_like empty_permuted empty_strided
    equal exponential_ eye fill fill_ flip full full_like gather hardswish histc index
    index_copy index_fill index_put index_put_ index_select isin item lift_fresh linspace
    _local_scalar_dense masked_fill masked_fill_ masked_scatter masked_select max
    max_pool2d_with_indices median min mode mse_loss multinomial new_empty new_empty_strided
    new_full new_ones new_zeros nll_loss2d_forward nll_loss_forward nonzero normal_ one_hot
    ones ones_like pixel_shuffle _prelu_kernel rand rand_like randint randn randn_like
    random_ reflection_pad1d reflection_pad2d repeat replication_pad1d replication_pad2d
    resize_ roll rot90 scalar_tensor scatter_ scatter searchsorted select_backward
    select_scatter set_ slice_backward slice_scatter sort squeeze_ stack t_ _to_copy topk
    transpose_ tril tril_indices triu triu_indices uniform_ _unique2 unique_consecutive
    unsafe_chunk _unsafe_index _unsafe_index_put unsafe_split unsafe_split_with_sizes
    _unsafe_view unsqueeze_ upsample_nearest1d upsample_nearest2d where zero_ zero zeros
    zeros_like""".split()
)
"""Packets that compute nothing that could be rounded in another order.

histc counts. nll_loss_forward reads one element a row; its sum over the rows is one number of the
whole batch, as is that of mse_loss.
"""

WINDOWS = frozenset(
    """avg_pool2d avg_pool3d _adaptive_avg_pool3d max_pool3d_with_indices
    upsample_linear1d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_3d im2col col2im
    log_sigmoid_forward""".split()
)
"""Packets that add up a few elements for each of their results, in one order (a test looks).

log_sigmoid_forward is element-wise without torch's tag.
Not grid_sampler_2d, which in bf16 on a CPU has given what was in memory before (torch 2.13).
"""

_PUTS = ("index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_", "put", "put_")
"""Assignments, unless they accumulate."""

_IN_ORDER_ON_CPU = ("index_add", "index_add_")
"""What adds in the order of its index there, and by atomic operations on a GPU."""

MADE_OF_OTHERS = frozenset("_safe_softmax softmax log_softmax _fused_rms_norm".split())
"""Packets whose kernel calls operators the mode replaces. (On a GPU `_fused_rms_norm` is one.)"""


_KNOWN = EXACT | WINDOWS | MADE_OF_OTHERS


@dataclass(frozen=True)
class Unknown:
    """One call of an operator whose rows may follow the batch."""

    operator: str
    """`aten.prod.dim_int`."""
    source: str
    """`file:line` of the code that called it."""
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} at {self.source}: {self.reason}"


class Recorder:
    """Collects the calls made meanwhile in this thread; a context manager."""

    def __init__(self) -> None:
        self.unknown: list[Unknown] = []
        self.seen: dict[str, int] = {}
        """How often each operator was called."""
        self._stack = contextlib.ExitStack()
        self._left: list[Any] = []

    def __enter__(self) -> Recorder:
        self._left = self._stack.enter_context(mode.watched())
        self._stack.enter_context(torch_watch.watching(self._see))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        left = bool(self._left)
        self._left.clear()
        self.seen[str(func)] = self.seen.get(str(func), 0) + 1
        reason = reason_of(func, args, kwargs, left)
        if reason is not None and _has_floats(made):
            self.unknown.append(Unknown(str(func), source.here()[0], reason))


def reason_of(func: Any, args: Any, kwargs: Any, left_to_torch: bool) -> str | None:
    """Why rows of this call may follow the batch, or None."""
    packet = func._schema.name.removeprefix("aten::")
    name = str(func).removeprefix("aten.").removesuffix(".default")
    if name in LEAVES:
        if not mode.active():
            return "the mode is off"
        return "the mode has no kernel for these arguments" if left_to_torch else None
    if packet in _PUTS and bool(_argument(func, args, kwargs, "accumulate")):
        return "what adds to one place is added in the order it comes"
    if func.namespace == "fxpass" or packet in _KNOWN:
        return None
    if packet in _IN_ORDER_ON_CPU and args[0].device.type == "cpu":
        return None
    if _is_view(func) or name in COMPOSITES or name in CPU_POINTWISE:
        return None
    if torch.Tag.pointwise in func.tags:
        return _scaled_sum(packet.rstrip("_"), args, kwargs)
    if packet == "_native_batch_norm_legit" and not _argument(func, args, kwargs, "training"):
        return None
    if packet == "_native_batch_norm_legit_no_training":
        return None
    return "no invariant kernel for it is known"


def _scaled_sum(packet: str, args: Any, kwargs: Any) -> str | None:
    """Of a 16-bit sum with an `alpha`, the CPU rounds another product at a tensor's end."""
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if packet not in ("add", "sub", "rsub") or alpha == 1:
        return None
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    on_cpu = any(t.device.type == "cpu" and t.dtype in NARROW for t in tensors)
    return "alpha is not one, in 16 bits on the CPU" if on_cpu else None


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """What a call gives an argument, or its default."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def _is_view(func: Any) -> bool:
    """Whether an operator only gives another look at its input."""
    returns = func._schema.returns
    infos = [r.alias_info for r in returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _has_floats(made: Any) -> bool:
    several = made if isinstance(made, (tuple, list)) else [made]
    tensors = [t for t in several if isinstance(t, torch.Tensor)]
    return any(t.is_floating_point() and t.numel() for t in tensors)
