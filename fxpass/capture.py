"""`explain`: the graphs a model compiles to, planned but neither compiled nor changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxpass import pipeline, torch_private
from fxpass.options import Options
from fxpass.report import Report
from fxpass.select import check_providers
from fxpass.sites import Decline


def explain(
    model: Callable[..., Any] | fx.GraphModule,
    *args: Any,
    options: Options | None = None,
    **kwargs: Any,
) -> Report:
    """What `rmsnorm_backend` would do to a model or function, called with these arguments.

    Runs Dynamo and AOTAutograd, then plans on the graphs that Inductor would get; generates no
    code. Works on fake tensors too. Graph breaks are followed by running the pieces eagerly.
    """
    from fxpass import diff_view

    chosen = Options.make(options)
    check_providers(chosen)
    report = Report()

    def plan(graph: fx.Graph) -> None:
        report.add(pipeline.dry_run(graph, chosen))
        diff_view.keep(report, graph, chosen)

    if isinstance(model, fx.GraphModule) and not args and not kwargs:
        for each in torch_private.graph_and_bodies(model):
            plan(each.graph)
        return report

    torch_private.visit_post_grad_graphs(model, args, kwargs, plan)
    if not report.rewritten and on_meta((*args, *kwargs.values())):
        report.declined.append(Decline("graph", f"{ON_META}; use FakeTensorMode on a real device"))
    return report


ON_META = "inputs are on the meta device, where Inductor folds the computation away"


def on_meta(values: Sequence[Any]) -> bool:
    """Whether a tensor is on the meta device."""
    return any(isinstance(v, torch.Tensor) and v.device.type == "meta" for v in values)


def graphs(
    model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[fx.GraphModule]:
    """The ATen graphs the pass would see, copied."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.Graph) -> None:
        found.append(fx.GraphModule(graph.owning_module or torch.nn.Module(), graph))

    torch_private.visit_post_grad_graphs(model, args, kwargs, keep)
    return found
