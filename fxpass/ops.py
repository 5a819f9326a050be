"""The operators a rewritten graph calls: torch.library ops with fake kernels and gradients.

`fxpass::norm` returns the result, `norm2` and `norm3` the result and what else the spec's outputs
name. Kernel and spec travel as text, so a graph can be printed, saved and cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpass.kernels import by_name, reference
from fxpass.spec import NormSpec

Tensor = torch.Tensor

_ARGUMENTS = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? eps_tensor,"
    " float eps, str kernel, str spec)"
)
_RETURNS = ("Tensor", "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)")
NAMES = ("norm", "norm2", "norm3")

_library: Any = getattr(torch.library, "Library")("fxpass", "DEF")  # noqa: B009 - untyped in torch


@functools.cache
def parsed(spec: str) -> NormSpec:
    """The spec of a text, parsed once."""
    return NormSpec.parse(spec)


class _Calls(dict[str, Callable[..., Any]]):
    """`"kernel spec"` -> the fastest callable: (x, residual, weight, bias, eps)."""

    def __missing__(self, key: str) -> Callable[..., Any]:
        kernel, _, spec = key.partition(" ")
        meaning = parsed(spec)
        try:
            found = by_name(kernel).entry(meaning)
        except Exception as error:
            # A cached graph may reach a machine that cannot build what it was compiled with.
            found = reference.instead_of(kernel, meaning, error)
        self[key] = found
        return found


calls = _Calls()
"""Filled as kernels are called; generated code looks its kernel up here."""


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps_tensor: Tensor | None,
    eps: float,
    kernel: str,
    spec: str,
) -> Any:
    """Run a kernel. A tensor for one output, else a tuple."""
    if eps_tensor is not None:
        eps = eps_tensor.item()
    return calls[f"{kernel} {spec}"](x, residual, weight, bias, eps)


def fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps_tensor: Tensor | None,
    eps: float,
    kernel: str,
    spec: str,
) -> Any:
    """Shapes, dtypes and strides of the outputs: contiguous, x's shape; row (..., 1)."""
    meaning = parsed(spec)
    made = {
        "out": lambda: x.new_empty(x.shape, dtype=meaning.out),
        "sum": lambda: x.new_empty(x.shape, dtype=meaning.normed),
        "row": lambda: x.new_empty((*x.shape[:-1], 1), dtype=meaning.row_dtype),
    }
    outputs = tuple(made[name]() for name in meaning.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.eps, ctx.spec = inputs[5], inputs[7]


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Gradients of the spec's own steps, recomputed with the reference; differentiable again."""
    flat = grads[0] if isinstance(grads[0], (list, tuple)) else grads
    x, residual, weight, bias, eps_tensor = ctx.saved_tensors
    eps = ctx.eps if eps_tensor is None else eps_tensor.item()
    again = torch.is_grad_enabled()  # create_graph: the gradients have gradients
    with torch.enable_grad():
        inputs = [_apart(tensor, again) for tensor in (x, residual, weight, bias)]
        first, second, third, fourth = inputs
        assert first is not None
        outputs = reference.launch(parsed(ctx.spec), first, second, third, fourth, eps)
        wanted = {i: tensor for i, tensor in enumerate(inputs) if tensor is not None}
        pairs = [(o, g) for o, g in zip(outputs, flat, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(wanted.values()),
            [g for _, g in pairs],
            allow_unused=True,
            create_graph=again,
        )
    by_input = dict(zip(wanted, found, strict=True))
    return (*(by_input.get(i) for i in range(4)), None, None, None, None)


def _apart(tensor: Tensor | None, again: bool) -> Tensor | None:
    """A tensor that no other input depends on; with `again` its gradient still goes on to it."""
    if tensor is None:
        return None
    if again and tensor.requires_grad:
        return tensor.view_as(tensor)  # x may come from the residual, or be it
    return tensor.detach().requires_grad_()


def _define() -> dict[int, Any]:
    packets = {}
    for count, (name, returns) in enumerate(zip(NAMES, _RETURNS, strict=True), start=1):
        _library.define(f"{name}{_ARGUMENTS} -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxpass::{name}", fake, lib=_library)
        torch.library.register_autograd(
            f"fxpass::{name}", _backward, setup_context=_setup, lib=_library
        )
        packets[count] = getattr(torch.ops.fxpass, name).default
    return packets


_PACKETS = _define()


def op_for(outputs: Sequence[str]) -> Any:
    """The operator that returns that many tensors."""
    return _PACKETS[len(outputs)]


def is_ours(target: Any) -> bool:
    """True for the operators of this module."""
    return target in _PACKETS.values()
