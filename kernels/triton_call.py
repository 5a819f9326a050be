"""A callable for the Triton row kernel of one spec: tensors in, tensors out.

Host time matters at decode sizes: what follows from shapes and strides is worked out once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fxpass.kernels import gpu_rows, triton_source
from fxpass.kernels.cuda_launch import empty_strided, on_device
from fxpass.kernels.gpu_call import addressed, check, keep
from fxpass.kernels.steps import single
from fxpass.kernels.triton_launch import ALIGNED, Launch
from fxpass.spec import NormSpec

Tensor = torch.Tensor


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
        given = [t for t in (x, residual, weight, bias) if t is not None]
        at = 0
        for tensor in given:
            at |= tensor.data_ptr()
        key = (
            at % ALIGNED == 0,
            eps,
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
            plan = self._planned(x, residual, weight, bias, eps, at % ALIGNED == 0)
            keep(self._plans, key, plan)
        with on_device(plan.device):
            made = [empty_strided(plan.device, *output) for output in plan.outputs]
            if plan.launch is not None:
                # Only x and residual may have other strides, if their rows can be addressed.
                rows = 1 if residual is None else 2
                given = [
                    t if index < rows and not plan.copies else t.contiguous()
                    for index, t in enumerate(given)
                ]
                plan.launch(plan.device, [*given, *made])
        return made[0] if len(made) == 1 else tuple(made)

    def _planned(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        aligned: bool,
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
        outputs = []
        for name in self._spec.outputs:
            shape = (*x.shape[:-1], 1) if name == "row" else tuple(x.shape)
            outputs.append((shape, gpu_rows.dense(shape), self._dtypes[name]))
        if not x.numel():
            return _Plan(None, x.get_device(), copies, outputs)
        chosen = self._choose(x.shape[-1], rows.count)
        launch = Launch(
            chosen.kernel,
            (-(-rows.count // chosen.rows_per_program),),
            [*(found[name] for name in self._integers), *([single(eps)] * self._spec.has_eps)],
            {},
            {"num_warps": chosen.warps},
            aligned=aligned,
        )
        return _Plan(launch, x.get_device(), copies, outputs)


class _Plan(NamedTuple):
    """What follows from the shapes, strides, dtypes and alignment of tensors."""

    launch: Launch | None
    """None if there are no elements."""
    device: int
    copies: bool
    outputs: list[tuple[Any, ...]]
    """Size, stride and dtype of each."""


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """All that `check` looks at, so that only a new plan has to be checked."""
    return tensor.get_device(), tensor.dtype, tensor.shape
