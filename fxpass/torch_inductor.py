"""The private parts of Inductor that a lowering uses, seen in torch 2.11 and 2.13.

A lowering turns one node of the graph into Inductor's IR. `Value` is one of Inductor's tensors
(a TensorBox); its sizes and strides are ints or sympy expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Value = Any
Size = Any
"""int, or a sympy expression when the dimension is symbolic."""


CPP_KEEPS_ROUNDINGS = torch.__version__ >= "2.13"
"""Whether its C++ reads a value that was rounded and widened again: that of 2.11 reads the one
before, and 26 % of a bf16 Llama norm differ. Its Triton code keeps roundings."""


def compiling_ahead_of_time() -> bool:
    """Whether AOTInductor is compiling: its package runs without Python, and so without fxpass."""
    import sys

    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and bool(virtualized.V.aot_compilation)


def lower_with(
    op: Any,
    calls: Mapping[str, Callable[..., Any]],
    lower: Callable[..., Any],
    trusted: Callable[[str], bool],
) -> None:
    """Register the lowering of one of our operators.

    `lower(*args)` gives the outputs, or None: then Inductor's Python calls the kernel itself
    instead of the dispatcher. A dispatcher call of a Python op costs 12 to 32 us on the host;
    looking the kernel up by a constant and calling it costs under 0.1. The generated module already
    imports `extern_kernels`, so the table is put there; `calls["kernel spec"]` takes (x, residual,
    weight, bias, eps). Generated C++ keeps the dispatcher.
    `trusted` kernels are not checked for the strides of what they return.
    """
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.virtualized import V

    namespace: Any = extern_kernels
    namespace.fxpass = calls
    if op in lowerings:
        return
    make_fallback: Callable[..., Any] = fallback_handler
    fallback = make_fallback(op, add_to_fallback_set=False)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        made = lower(*args, **kwargs)
        if made is not None:
            return made
        outputs = fallback(*args, **kwargs)
        eps_tensor, kernel, spec = args[4], args[6], args[7]
        if not V.graph.cpp_wrapper:
            several = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            name = f"extern_kernels.fxpass[{f'{kernel} {spec}'!r}]"
            _shorten(_fallback_kernel(several[0]), name, eps_tensor is not None)
            if trusted(kernel):
                for output in several:
                    _drop_assert(output)
        return outputs

    register_lowering(op, type_promotion_kind=None)(lowering)


def _shorten(node: Any, name: str, eps_is_tensor: bool) -> None:
    """Have a FallbackKernel written as `name(x, residual, weight, bias, eps)`.

    An eps that is a tensor (what dynamic shapes make of a Python float, on the CPU) is read there.
    """
    if node is None:
        return
    full = node.codegen_args

    def five() -> list[str]:
        args = list(full())
        return [*args[:4], f"{args[4]}.item()" if eps_is_tensor else args[5]]

    node.python_kernel_name = name
    node.codegen_args = five


def _drop_assert(output: Value) -> None:
    """Leave out the checks of an output's strides and alignment (0.2 us each).

    Our own kernels' strides are tested, and what the allocator gives is aligned.
    """
    from torch._inductor import ir

    buffer: Any = output
    for _ in range(4):
        if isinstance(buffer, ir.MultiOutput):
            produced: Any = buffer
            produced.codegen_size_asserts = lambda wrapper: None
            produced.codegen_alignment_asserts = lambda wrapper: None
            return
        buffer = getattr(buffer, "data", None)


def _fallback_kernel(output: Value) -> Any:
    """The FallbackKernel that produces an Inductor value, or None if it is not one."""
    from torch._inductor import ir

    buffer = output
    for _ in range(4):
        if isinstance(buffer, ir.FallbackKernel):
            return buffer
        if isinstance(buffer, ir.MultiOutput):
            buffer = buffer.inputs[0]
        elif hasattr(buffer, "data"):
            buffer = buffer.data
        else:
            return None
    return buffer if isinstance(buffer, ir.FallbackKernel) else None


# ---- Values -------------------------------------------------------------------------------------


def size_of(value: Value) -> tuple[Size, ...]:
    """The sizes, those known as ints."""
    return tuple(map(plain, value.get_size()))


def stride_of(value: Value) -> tuple[Size, ...]:
    """The strides, those known as ints; of a value that `in_memory` gave."""
    return tuple(map(plain, value.get_stride()))


def device_of(value: Value) -> torch.device:
    """The device."""
    found: torch.device = value.get_device()
    return found


def plain(size: Size) -> Size:
    """A size as an int if it is one."""
    return int(size) if getattr(size, "is_Integer", False) else size


def known_equal(a: Size, b: Size) -> bool:
    """True if two sizes are known to be equal, without adding a guard."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_equals(a, b))


def ceil_div(size: Size, by: int) -> Size:
    """The quotient rounded up."""
    from torch.utils._sympy.functions import FloorDiv

    return size if by == 1 else plain(FloorDiv(size + by - 1, by))


def in_memory(value: Value) -> Value:
    """The value as a tensor in memory, a view of one if it is that, with strides that stay."""
    from torch._inductor import ir

    realized: Any = ir.ExternKernel.realize_input(value)
    box = realized if isinstance(realized, ir.TensorBox) else ir.TensorBox(realized)
    box.freeze_layout()
    return box


def contiguous(value: Value) -> Value:
    """The value in memory without gaps, copied only if it is not so already."""
    from torch._inductor import ir

    made: Any = ir.ExternKernel.require_contiguous(value)
    return in_memory(made)


def empty(size: Sequence[Size], dtype: torch.dtype, device: torch.device) -> Value:
    """A new contiguous tensor for a kernel to fill."""
    return _lowering(torch.ops.aten.empty_strided.default)(
        list(size), None, dtype=dtype, device=device
    )


def viewed(value: Value, size: Sequence[Size]) -> Value:
    """The value in another shape of as many elements."""
    return _lowering(torch.ops.aten.view.default)(value, list(size))


def summed(value: Value) -> Value:
    """The float32 sum over the last dim, which stays with size 1."""
    return _lowering(torch.ops.aten.sum.dim_IntList)(value, [-1], True)


def pointwise(
    like: Value, dtype: torch.dtype, size: Sequence[Size], at: Callable[[Sequence[Any]], Any]
) -> Value:
    """A value computed element by element: `at` takes an index and uses `ops()`."""
    from torch._inductor import ir

    return ir.Pointwise.create(device=device_of(like), dtype=dtype, inner_fn=at, ranges=list(size))


def ops() -> Any:
    """The operations an element is computed with."""
    from torch._inductor.virtualized import ops as found

    return found


def remainder(index: Any, size: Size) -> Any:
    """The index modulo a size."""
    from torch.utils._sympy.functions import ModularIndexing

    return ModularIndexing(index, 1, size)


def comes_rounded(value: Value) -> bool:
    """Whether a value is read from memory that no fused kernel fills.

    A fused kernel may hand on a 16-bit value in float32, as it was before it was stored.
    """
    from torch._inductor import ir

    root = value
    while isinstance(root, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        root = root.data
    return isinstance(root, (ir.InputBuffer, ir.ExternKernel))


def read_twice(value: Value) -> None:
    """Tell Inductor, which then computes a costly value once and stores it."""
    value.mark_reuse(2)


def store(value: Value) -> None:
    """Have a value written to memory."""
    value.realize()


def _lowering(op: Any) -> Any:
    from torch._inductor.lowering import lowerings

    return lowerings[op]


# ---- Triton kernels -----------------------------------------------------------------------------

_autotuners: dict[tuple[int, int], tuple[Any, Any]] = {}


def launch_triton(
    kernel: Any,
    num_warps: int,
    programs: Size,
    given: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> None:
    """Add the launch of a Triton kernel to the graph, as if the user had written it.

    `given` are the values and sizes, `constants` plain numbers, both by argument name.
    """
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_mutation,
    )
    from torch._inductor.virtualized import V

    _lowering(triton_kernel_wrapper_mutation)(
        kernel_idx=kernel_side_table.add_kernel(configured(kernel, num_warps)),
        constant_args_idx=kernel_side_table.add_constant_args(dict(constants)),
        grid=[(programs, 1, 1)],
        tma_descriptor_metadata={},
        kwargs=dict(given),
    )
    # Newer Inductors can move a following operation before the store, which is the last rounding.
    node: Any = V.graph.operations[-1]
    node.can_fuse_epilogue = lambda: False


def configured(kernel: Any, num_warps: int) -> Any:
    """The kernel with its number of warps: an autotuner with one choice, which never measures."""
    key = (id(kernel), num_warps)
    if key not in _autotuners:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

        config = triton.Config({}, num_warps=num_warps, num_stages=1)
        _autotuners[key] = (kernel, triton.autotune(configs=[config], key=[])(kernel))
    return _autotuners[key][1]


def call_directly(op: Any, name: str, calls: Mapping[str, Callable[..., Any]]) -> None:
    """Have Inductor's Python call `calls[name]` where the graph has `op`, without the dispatcher.

    Results have the strides the fake kernel says, which is not checked at run time.
    """
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.virtualized import V

    namespace: Any = extern_kernels
    namespace.fxpass_invariant = calls
    if op in lowerings:
        return
    make_fallback: Callable[..., Any] = fallback_handler
    fallback = make_fallback(op, add_to_fallback_set=False)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        outputs = fallback(*args, **kwargs)
        several = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        node = _fallback_kernel(several[0])
        if node is not None and not V.graph.cpp_wrapper:
            node.python_kernel_name = f"extern_kernels.fxpass_invariant[{name!r}]"
            for output in several:
                _drop_assert(output)
        return outputs

    register_lowering(op, type_promotion_kind=None)(lowering)
