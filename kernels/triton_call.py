"""A callable for the Triton row kernel of one spec: tensors in, tensors out.

Host time matters at decode sizes. What follows from shapes and strides is worked out once and kept.
Triton finds the compiled kernel for each call's arguments again, by their types, alignment and
values; the first call of a plan is launched like that, and what it returns is launched directly
from then on, with addresses for tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fxpass.kernels import triton_source
from fxpass.kernels.gpu_call import PLANS_MOST, addressed, check
from fxpass.spec import NormSpec

Tensor = torch.Tensor

_ALIGNED = 16  # bytes: what Triton compiles pointers for


class Compiled(NamedTuple):
    """A kernel as Triton launches it: `kernel[grid](*arguments, num_warps=warps)`."""

    kernel: Any
    rows_per_program: int
    warps: int


class RowCall:
    """(x, residual, weight, bias, eps) -> a tensor, or a tuple if the spec has more outputs."""

    def __init__(self, spec: NormSpec, choose: Callable[[int, int], Compiled]) -> None:
        """choose: (hidden, rows) -> the kernel for them."""
        self._spec, self._choose = spec, choose
        self._integers = [
            name
            for name in triton_source.parameters(spec)
            if name in ("rows", "inner") or name.endswith(("_outer", "_step", "_rows"))
        ]
        self._dtypes = {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}
        self._plans: dict[Any, _Plan] = {}

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Any:
        """Shapes as in `contract.Launch`."""
        key = (
            x.get_device(),
            x.dtype,
            x.shape,
            x.stride(),
            None if residual is None else (*_kind(residual), residual.stride()),
            None if weight is None else _kind(weight),
            None if bias is None else _kind(bias),
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._planned(x, residual, weight, bias)
            if len(self._plans) >= PLANS_MOST:
                self._plans.clear()
            self._plans[key] = plan
        if plan.copies:
            x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        made = [
            torch.empty(
                (*x.shape[:-1], 1) if name == "row" else x.shape,
                dtype=self._dtypes[name],
                device=x.device,
            )
            for name in self._spec.outputs
        ]
        if x.numel():
            shared = [t.contiguous() for t in (weight, bias) if t is not None]
            inputs = [x] if residual is None else [x, residual]
            plan.launch([*inputs, *shared, *made], (float(eps),) if self._spec.has_eps else ())
        return made[0] if len(made) == 1 else tuple(made)

    def _planned(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> _Plan:
        """Check the tensors, and work out the launch for others like them."""
        check(self._spec, x.shape[-1], str(x.device), x, residual, weight, bias)
        inputs = ["x"] if residual is None else ["x", "residual"]
        rows, copies = addressed(x, residual)
        found = {"rows": rows.count, "inner": rows.inner}
        for name, outer, step in zip(inputs, rows.outer, rows.step, strict=True):
            found[f"{name}_outer"], found[f"{name}_step"] = outer, step
        for name, shared in (("weight", weight), ("bias", bias)):
            if shared is not None:
                found[f"{name}_rows"] = shared.numel() // x.shape[-1]
        chosen = self._choose(x.shape[-1], rows.count)
        programs = -(-rows.count // chosen.rows_per_program)
        integers = tuple(found[name] for name in self._integers)
        return _Plan(chosen, programs, integers, x.get_device(), copies, _is_reusable(x))


class _Plan:
    """One launch, complete but for its tensors and eps."""

    def __init__(
        self,
        chosen: Compiled,
        programs: int,
        integers: tuple[int, ...],
        device: int,
        copies: bool,
        reusable: bool,
    ) -> None:
        self.copies = copies
        self._chosen, self._grid, self._integers = chosen, (programs, 1, 1), integers
        self._device, self._reusable = device, reusable
        self._again: Callable[..., Any] | None = None

    def launch(self, tensors: list[Tensor], eps: tuple[float, ...]) -> None:
        """On the current stream of the tensors' device."""
        here = self._device < 0 or torch.cuda.current_device() == self._device
        with nullcontext() if here else torch.cuda.device(self._device):
            if not self._reusable:
                self._first(tensors, eps)
                return
            pointers = [tensor.data_ptr() for tensor in tensors]
            if any(pointer % _ALIGNED for pointer in pointers):
                self._first(tensors, eps)
            elif self._again is not None:
                self._again(*pointers, *self._integers, *eps)
            else:
                compiled = self._first(tensors, eps)
                if hasattr(compiled, "__getitem__"):
                    self._again = compiled[self._grid]

    def _first(self, tensors: list[Tensor], eps: tuple[float, ...]) -> Any:
        kernel, _, warps = self._chosen
        return kernel[self._grid](*tensors, *self._integers, *eps, num_warps=warps)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """All that `check` looks at, so that only a new plan has to be checked."""
    return tensor.get_device(), tensor.dtype, tensor.shape


def _is_reusable(x: Tensor) -> bool:
    """Whether equal shapes, dtypes and alignment mean the same compiled kernel.

    For AMD GPUs Triton also looks at the size of the memory that a tensor is a view of.
    """
    return x.is_cuda and torch.version.hip is None
