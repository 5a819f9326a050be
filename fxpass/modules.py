"""`nn.RMSNorm` modules of a plain FX graph, opened so that the matcher can see into them.

`torch.fx.symbolic_trace` keeps torch.nn modules whole; Dynamo and torch.export do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxpass import facts
from fxpass.torch_private import has_global_hooks


def open_norms(graph_module: fx.GraphModule) -> int:
    """Replace each call of an nn.RMSNorm by F.rms_norm on its weight. Returns how many.

    The same operator runs either way, so an opened graph computes the same bits.
    """
    modules = dict(graph_module.named_modules())
    opened = 0
    for node in list(graph_module.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        given = [*node.args, *node.kwargs.values()]
        if type(module) is not torch.nn.RMSNorm or len(given) != 1 or _is_changed(module):
            continue
        _open(graph_module.graph, node, given[0], module)
        opened += 1
    if opened:
        graph_module.recompile()
    return opened


def _open(graph: fx.Graph, node: fx.Node, x: Any, module: torch.nn.RMSNorm) -> None:
    with graph.inserting_before(node):
        weight = None if module.weight is None else graph.get_attr(f"{node.target}.weight")
        args = (x, tuple(module.normalized_shape), weight, module.eps)
        call = graph.call_function(F.rms_norm, args)
    facts.take_over(call, node)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_changed(module: torch.nn.RMSNorm) -> bool:
    """Whether a call of it does more than torch's own, or something else."""
    forward = type(module).forward
    own = (forward.__module__, forward.__qualname__)
    if "forward" in vars(module) or own != (type(module).__module__, "RMSNorm.forward"):
        return True
    return has_global_hooks() or any(getattr(module, name) for name in _HOOKS)
