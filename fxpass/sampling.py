"""`verify=True`: runs a site's old nodes and its new kernel on sampled inputs, at compile time.

A rewrite is refused if the two differ by more than its label allows: with the same roundings only
the order of a float32 sum may differ, which moves the value per row by a few float32 ulps and so
flips the rounding of a few 16-bit elements by one ulp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpass import facts, ops
from fxpass.plan import Decisions, Plan, without
from fxpass.select import KEPT

_SHARE_16_BIT = 2e-3
"""Largest share of 16-bit elements that may differ. A float32 sum in another order is off by a
few 2**-24, and a bf16 rounding flips when the value lies that close to a midpoint: 2**-15 of all
elements per ulp; measured 0 to 5e-6 for a plain row kernel."""

_UNKNOWN_SIZE = 8
"""Stands for a size that only the data decides."""

_FLOAT32_ULPS = 64
"""float32 results may be off by a few ulps of the sum; hidden 65536 stays under this."""


def refuse_what_differs(decisions: Decisions) -> Decisions:
    """Moves plans whose sampled results differ beyond their label to the declined ones."""
    reasons = {plan: difference(plan) for plan in decisions.plans}
    return without(decisions, {plan: why for plan, why in reasons.items() if why is not None})


def difference(plan: Plan) -> str | None:
    """Why the sampled results are too far apart, or None."""
    if plan.choice.label != KEPT:
        return None
    site = plan.site
    generator = torch.Generator().manual_seed(0)
    env = {node: _sample(node, generator) for node in site.inputs}
    _run_nodes(site.interior, env, generator)
    assert plan.choice.kernel is not None
    new = run_kernel(plan, env)
    old = {"out": site.out_nodes, "sum": site.sum_nodes, "row": site.row_nodes}
    for name, result in new.items():
        expected = env[old[name][0]]
        reason = _too_far(name, expected, result.reshape(expected.shape))
        if reason is not None:
            return f"verify: {plan.choice.kernel.name} {reason}"
    return None


def run_kernel(plan: Plan, env: dict[fx.Node, Any]) -> dict[str, torch.Tensor]:
    """A plan's kernel on values of the site's inputs: its results by name."""
    site, choice = plan.site, plan.choice
    assert choice.kernel is not None
    rank = choice.kernel.contract.layout.rank
    x = _rows(env[site.x], site.dims, rank)
    residual = None if site.residual is None else _rows(env[site.residual], site.dims, rank)
    weight, bias = (None if n is None else env[n].contiguous() for n in (site.weight, site.bias))
    eps = None if site.eps_node is None else env[site.eps_node]
    name, text = choice.kernel.name, str(choice.spec)
    found = ops.run(x, residual, weight, bias, eps, site.eps, name, text)
    outputs = found if isinstance(found, (tuple, list)) else (found,)
    return dict(zip(choice.spec.outputs, outputs, strict=True))


def _rows(tensor: torch.Tensor, dims: int, rank: int | None) -> torch.Tensor:
    rows = tensor.flatten(tensor.ndim - dims).contiguous()
    return rows.reshape(-1, rows.shape[-1]) if rank == 2 else rows


def _sample(node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    """Normal values in the node's shape; small positive ones for a single element (eps)."""
    found = facts.of(node)
    assert found is not None
    shape = [hint(size) for size in found.shape]
    if torch.Size(shape).numel() == 1:
        return torch.full(shape, 1e-6, dtype=found.dtype, device=found.device)
    return torch.randn(shape, generator=generator).to(found.device, found.dtype)


def hint(size: facts.Size) -> int:
    """A size as a number: that of the example it was traced with."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return _UNKNOWN_SIZE if known is None else int(known)


def _run_nodes(
    nodes: tuple[fx.Node, ...], env: dict[fx.Node, Any], generator: torch.Generator
) -> None:
    """Run nodes in graph order with the operators they name."""

    def value(node: fx.Node) -> Any:
        if node not in env:
            found = facts.value(node)
            symbolic = isinstance(found, (int, torch.SymInt))
            env[node] = hint(found) if symbolic else _sample(node, generator)
        return env[node]

    for node in nodes:
        if node in env:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _too_far(name: str, old: torch.Tensor, new: torch.Tensor) -> str | None:
    if old.dtype != new.dtype:
        return f"returns {name} as {new.dtype}, the graph has {old.dtype}"
    if old.dtype == torch.float32:
        bound = _FLOAT32_ULPS * torch.finfo(torch.float32).eps
        worst = ((old - new).abs() / old.abs().clamp_min(1e-30)).nan_to_num().max().item()
        return f"differs in {name} by {worst:.1e} (relative)" if worst > bound else None
    share = (old != new).float().mean().item()
    if share > _SHARE_16_BIT and int((old != new).sum()) > 2:
        return f"differs in {100 * share:.2f} % of {name}'s elements"
    return None
