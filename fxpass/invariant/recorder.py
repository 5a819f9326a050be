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
    """_local_scalar_dense _to_copy _unique2 _unsafe_index _unsafe_index_put _unsafe_view all
    amax amin aminmax any arange argmax argmin argsort bernoulli bincount broadcast_tensors
    bucketize cat clone constant_pad_nd copy copy_ count_nonzero cummax cummin detach
    detach_ diag_embed embedding empty empty_like empty_permuted empty_strided equal
    exponential_ eye fill fill_ flip full full_like gather histc index index_copy index_fill
    index_put index_put_ index_select isin item lift_fresh linspace masked_fill
    masked_scatter masked_select max max_pool2d_with_indices median min mode multinomial
    new_empty new_empty_strided new_full new_ones new_zeros nll_loss2d_forward
    nll_loss_forward nonzero normal_ one_hot ones ones_like pixel_shuffle rand rand_like
    randint randn randn_like random_ reflection_pad1d reflection_pad2d repeat
    select_backward slice_backward squeeze_ transpose_ t_ unsqueeze_ unsafe_split
    unsafe_split_with_sizes unsafe_chunk _prelu_kernel hardswish
    replication_pad1d replication_pad2d resize_ roll rot90 scalar_tensor scatter scatter_
    searchsorted select_scatter set_ slice_scatter sort stack topk tril tril_indices triu
    triu_indices uniform_ unique_consecutive upsample_nearest1d upsample_nearest2d where
    zero zero_ zeros zeros_like""".split()
)
"""Packets that compute nothing that could be rounded in another order.

histc counts. nll_loss_forward reads one element a row; its sum over the rows is one number of the
whole batch.
"""

MADE_OF_OTHERS = frozenset("_safe_softmax softmax log_softmax _fused_rms_norm".split())
"""Packets whose kernel calls operators the mode replaces. (On a GPU `_fused_rms_norm` is one.)"""


@dataclass(frozen=True)
class Unknown:
    """One call of an operator whose rows may follow the batch."""

    operator: str
    """`aten.avg_pool2d.default`."""
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
    if func.namespace == "fxpass" or packet in EXACT or packet in MADE_OF_OTHERS:
        return None
    if _is_view(func) or name in COMPOSITES or name in CPU_POINTWISE:
        return None
    if torch.Tag.pointwise in func.tags:
        return _scaled_sum(packet.rstrip("_"), args, kwargs)
    if packet in ("native_batch_norm", "_native_batch_norm_legit") and not _trains(func, args):
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


def _trains(func: Any, args: Any) -> bool:
    names = [a.name for a in func._schema.arguments]
    return bool(args[names.index("training")])


def _is_view(func: Any) -> bool:
    """Whether an operator only gives another look at its input."""
    returns = func._schema.returns
    infos = [r.alias_info for r in returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _has_floats(made: Any) -> bool:
    several = made if isinstance(made, (tuple, list)) else [made]
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in several)
