"""What the graph tells about a node's tensor. The only reader of `node.meta`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass.torch_private import constant_size, is_transformed, statically_known_true

Size = Any
"""int, or torch.SymInt when the dimension is symbolic."""


@dataclass(frozen=True, eq=False)
class TensorFacts:
    """Shape, dtype, strides and device of the tensor a node computes."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    stride: tuple[Size, ...]
    device: torch.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


def value(node: fx.Node) -> Any:
    """The fake value of a node: `val` at ATen level, `example_value` at Dynamo level."""
    for key in ("val", "example_value"):  # not ShapeProp's tensor_meta: it names no device
        if key in node.meta:
            return node.meta[key]
    return None


def set_value(node: fx.Node, fake: Any, like: fx.Node) -> None:
    """Give a new node its fake value and the user's source, in the keys the graph uses."""
    key = "example_value" if "example_value" in like.meta and "val" not in like.meta else "val"
    node.meta[key] = fake
    for inherited in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
        if inherited in like.meta:
            node.meta.setdefault(inherited, like.meta[inherited])


def storage(node: fx.Node) -> int | None:
    """Identity of the fake memory behind a node; nodes that share it are views of one tensor.

    None if that is not known.
    """
    found = value(node)
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        return None
    try:
        return int(found.untyped_storage()._cdata)
    except NotImplementedError:  # inside torch.vmap a tensor has no memory of its own
        return None


def in_transform(node: fx.Node) -> bool:
    """True for a tensor of a function that `torch.vmap` or `torch.func.grad` is applied to."""
    found = value(node)
    return isinstance(found, torch.Tensor) and is_transformed(found)


def requires_grad(node: fx.Node) -> bool:
    """True if autograd follows the node's tensor."""
    return bool(getattr(value(node), "requires_grad", False))


def take_over(node: fx.Node, old: fx.Node) -> None:
    """Give a node that computes the same tensor as an old one all that is known of it."""
    node.meta.update(old.meta)


def of(node: fx.Node) -> TensorFacts | None:
    """Facts of a node, or None if it does not compute one strided tensor."""
    found = value(node)
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        return None
    return TensorFacts(tuple(found.shape), found.dtype, tuple(found.stride()), found.device)


def has_any(graph: fx.Graph) -> bool:
    """Whether the graph says anything about its tensors."""
    return any(of(node) is not None for node in graph.nodes)


def same(a: Size, b: Size) -> bool:
    """True if two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if not isinstance(a, (int, torch.SymInt)) or not isinstance(b, (int, torch.SymInt)):
        return False
    return statically_known_true(a == b)


def same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    """True if two shapes are known to be equal, without adding a guard."""
    return len(a) == len(b) and all(map(same, a, b))


def numel(shape: tuple[Size, ...]) -> Size:
    """Product of the sizes."""
    total: Size = 1
    for size in shape:
        total = total * size
    return total


def static(size: Size) -> int | None:
    """The size as an int, or None if it is symbolic."""
    return size if isinstance(size, int) else constant_size(size)


_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)')


def _frame(node: fx.Node) -> tuple[str, str, str, str] | None:
    """The innermost frame of the node's stack that is not inside torch itself."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith((_TORCH, _OURS))]
    found = own or [frame for frame in frames if not frame[0].startswith(_OURS)]
    return found[-1] if found else None


def location(node: fx.Node) -> str:
    """`file:line` of the user's code that made the node, or `?` if the graph does not say."""
    frame = _frame(node)
    return f"{frame[0]}:{frame[1]}" if frame else "?"


def source_line(node: fx.Node) -> str:
    """The text of the user's line that made the node, or an empty string."""
    frame = _frame(node)
    return frame[3].strip() if frame else ""


def module_path(node: fx.Node) -> str:
    """Path of the innermost nn.Module, for example `model.layers.0.input_layernorm`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['\w+'\]\.?|^L__self___?|^getattr\(|^self\.", "", path)
    path = re.sub(r"\[['\"]?([\w]+)['\"]?\]", r".\1", path)
    return path.replace("_modules.", "").strip(".")
