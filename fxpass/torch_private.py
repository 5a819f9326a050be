"""Private parts of torch's compiler, with the versions they were seen in.

Inductor's lowerings are in `torch_inductor.py`, fake tensors in `torch_fakes.py`, the dispatcher in
`torch_dispatcher.py`; nothing else touches what is private in torch.

Heavy modules (Inductor, Dynamo) are imported inside the functions that need them, so that
`import fxpass` stays as cheap as `import torch`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import fx


def statically_known_true(condition: Any) -> bool:
    """Whether a (symbolic) condition holds for all sizes, decided without a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    return bool(known(condition))


def constant_size(size: torch.SymInt) -> int | None:
    """The value of a symbolic size that is a number after all (0 times an unknown), or None."""
    found: int | None = size.node.maybe_as_int()
    return found


def is_transformed(tensor: torch.Tensor) -> bool:
    """True for the tensors that functorch's transforms hand to a function."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def run_fake(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call `function` on fake tensors, in their FakeTensorMode or in a fresh one."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    modes = {id(t.fake_mode): t.fake_mode for t in tensors if isinstance(t, FakeTensor)}
    if len(modes) == 1:
        # Not detect_fake_mode: inside a Dynamo backend it prefers Dynamo's other mode.
        mode = next(iter(modes.values()))
    elif modes:
        mode = FakeTensorMode()  # make_fx gives each input a mode of its own
        with mode:
            args = [_same_layout(a) if isinstance(a, torch.Tensor) else a for a in args]
    else:
        mode = detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return function(*args, **kwargs)


def _same_layout(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def custom_graph_pass_base() -> type:
    """Inductor's base class of cacheable graph passes (seen in 2.11 to 2.15)."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


GRAD_SWITCHES = frozenset((torch._C._set_grad_enabled,))
"""What Dynamo writes into a graph for `torch.no_grad` and `torch.enable_grad`."""


@functools.cache
def runs_graphs(target: Any) -> bool:
    """True for higher-order operators, such as `cond` and a checkpoint, whose body is a graph."""
    from torch._ops import HigherOrderOperator

    return isinstance(target, HigherOrderOperator)


def schemas(target: Any) -> list[Any]:
    """The schemas of an operator: its own, or those of all overloads of a packet."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = cast("Any", target).overloads()
        return [getattr(target, name)._schema for name in names]
    found = getattr(target, "_schema", None)
    return [] if found is None else [found]


def has_global_hooks() -> bool:
    """Whether `torch.nn.modules.module.register_module_*_hook` was called."""
    return bool(cast("Any", torch.nn.modules.module)._has_any_global_hook())


def inductor_config() -> Any:
    """`torch._inductor.config`."""
    from torch._inductor import config

    return config


_in_inductor: ContextVar[bool] = ContextVar("fxpass_in_inductor", default=False)


@contextlib.contextmanager
def inside_inductor() -> Iterator[None]:
    """Says that the graph at hand is one Inductor is compiling."""
    before = _in_inductor.set(True)
    try:
        yield
    finally:
        _in_inductor.reset(before)


def is_inside_inductor() -> bool:
    """Whether Inductor, and not eager, will run the graph at hand."""
    return _in_inductor.get()


def compile_fx(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    patches: dict[str, Any],
    look: Callable[[fx.GraphModule, Callable[[], Any]], Any],
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Inductor's entry point, with config patches held while it runs (backward included).

    `look` is called with each ATen graph and what compiles it; `decompositions` replace Inductor's.
    """
    from torch._inductor.compile_fx import compile_fx as inductor_compile
    from torch._inductor.compile_fx import compile_fx_inner

    def inner(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        # A table of somebody's functions is no part of a cache key; the passes' ids are.
        kwargs.pop("get_decomp_fn", None)
        with inside_inductor():
            return look(graph, lambda: compile_fx_inner(graph, *args, **kwargs))

    compiled: Any = inductor_compile(
        graph_module,
        inputs,
        inner_compile=inner,
        config_patches=patches,
        decompositions=decompositions,
    )
    return cast("Callable[..., Any]", compiled)


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decomposition table."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def traced(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule | None:
    """The graph of a function of fake values; None if it gives NotImplemented."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    refused = False

    def run(*given: Any) -> Any:
        nonlocal refused
        made = function(*given)
        refused = made is NotImplemented
        return None if refused else made

    mode = detect_fake_mode(values)
    with contextlib.nullcontext() if mode is None else mode:
        made: fx.GraphModule = make_fx(run)(*values)
    return None if refused else made


def leaves(value: Any) -> list[Any]:
    """What a nested result holds."""
    from torch.utils import _pytree

    return list(_pytree.tree_leaves(value))


def unflattened(values: Sequence[Any], spec: Any) -> Any:
    """The nested value that `leaves` took apart, from its spec."""
    from torch.utils import _pytree

    return _pytree.tree_unflatten(list(values), spec)


def mode_patches(mode: str | None) -> dict[str, Any]:
    """The Inductor config patches behind torch.compile's `mode`."""
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def visit_post_grad_graphs(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    visit: Callable[[fx.Graph], None],
) -> None:
    """Call `visit` on each graph that Inductor's post-grad passes would get, compiling nothing."""
    through_post_grad(model, visit)(*args, **kwargs)


def through_post_grad(
    model: Callable[..., Any],
    change: Callable[[fx.Graph], None],
    run: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """The model as its post-grad graphs, once `change` has seen each; `run` makes what runs one.

    The bodies of cond and the like are graphs of their own, as Inductor's hook sees them.
    """
    from torch._inductor.compile_fx import compile_fx as inductor_compile

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        for each in graph_and_bodies(graph_module):
            with inside_inductor():
                change(each.graph)
            each.recompile()
        return run(graph_module) if run else graph_module

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return inductor_compile(
            graph_module,
            inputs,
            inner_compile=inner,
            config_patches={"force_disable_caches": True, "fx_graph_cache": False},
        )

    compiled: Callable[..., Any] = torch.compile(_fresh(model), backend=backend)
    return compiled


def graph_and_bodies(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph module, then those inside it: bodies of cond, checkpoint and the like."""
    return [inner for inner in graph_module.modules() if isinstance(inner, fx.GraphModule)]


def visit_at_each_hook(
    function: Callable[..., Any],
    args: Sequence[Any],
    visit: Callable[[str, fx.Graph], None],
) -> None:
    """Call `visit` on a call's graphs as Dynamo's backends, joint and post-grad hooks get them."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        with inside_inductor():
            visit("post-grad", graph_module.graph)
        return graph_module

    def joint(graph: fx.Graph) -> None:
        with inside_inductor():
            visit("joint", graph)

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        visit("dynamo", graph_module.graph)
        patches = {"force_disable_caches": True, "joint_custom_pre_pass": joint}
        return inductor_compile(graph_module, inputs, inner_compile=inner, config_patches=patches)

    torch.compile(_fresh(function), backend=backend, dynamic=False)(*args)


_FRESH = itertools.count()


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model behind a function of its own.

    Dynamo keeps what it compiled, and counts recompiles, per code object; a code object made anew
    shares neither with the user's own compiles nor with an earlier call. Sizes that changed are
    remembered by file, line and name (2.11), so the name is new too.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"explained_{next(_FRESH)}")
    return call


def every_size_dynamic() -> contextlib.AbstractContextManager[None]:
    """What `torch.compile(dynamic=True)` turns on."""
    from torch._dynamo import config

    patched: Any = config
    return cast(
        "contextlib.AbstractContextManager[None]", patched.patch(assume_static_by_default=False)
    )


def inductor_cache_dir() -> str:
    """Where Inductor keeps compiled code."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def is_tracing() -> bool:
    """Whether a structured trace is being written (TORCH_TRACE)."""
    from torch._logging._internal import trace_log

    # Without TORCH_TRACE the handler takes itself out when Dynamo logs its first line.
    return bool(trace_log.handlers)


def trace_artifact(name: str, encoding: str, text: str) -> None:
    """Put a text into the structured trace; tlparse shows it under the compile at hand."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )


def debug_folder() -> str | None:
    """Where Inductor writes about the graph at hand (TORCH_COMPILE_DEBUG), if it does."""
    from torch._inductor.virtualized import V

    path = getattr(V.debug, "_path", None)
    return None if path is None else str(path)
