"""`fxpass.rewrite` on graphs of every origin, and what it must not move: gradients, writes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cases_rounding import unit
from helpers import capture, changed, differences, rewritten, tensor, tensors
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

import fxpass

REFERENCE = {"providers": ("reference",), "strict": True}
X, W = tensors("bf16[2,8,64]", "bf16[64]")


def llama(x, w):
    return w * unit(x).to(x.dtype)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(W.clone())
        self.norm = torch.nn.RMSNorm(64).bfloat16()
        self.linear = torch.nn.Linear(64, 64).bfloat16()

    def forward(self, x):
        return self.norm(self.linear(llama(x, self.weight)) + x)


BLOCK = Block().requires_grad_(False)


def test_symbolic_trace() -> None:
    traced = fx.symbolic_trace(BLOCK)
    report = fxpass.rewrite(traced, X, **REFERENCE)
    assert len(report.rewritten) == 2, str(report)
    assert not differences(BLOCK(X), traced(X))


@pytest.mark.parametrize("shapes", [False, True])
def test_symbolic_trace_without_inputs_says_what_is_missing(shapes: bool) -> None:
    traced = fx.symbolic_trace(llama)
    if shapes:  # which name no device
        ShapeProp(traced).propagate(X, W)
    report = fxpass.rewrite(traced, **REFERENCE)
    assert not report.rewritten
    assert "pass example inputs" in str(report)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    traced = make_fx(llama, tracing_mode=mode)(X, W)
    assert len(fxpass.rewrite(traced, **REFERENCE).rewritten) == 1
    other = tensor("bf16[5,3,64]") if mode == "symbolic" else X
    assert not differences(llama(other, W), traced(other, W))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec")
@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
def test_export(decomposed: bool) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(BLOCK, (X,), dynamic_shapes=({0: batch},))
    program = program.run_decompositions({}) if decomposed else program
    report = fxpass.rewrite(program.graph_module, **REFERENCE)
    assert len(report.rewritten) == 2, str(report)
    other = tensor("bf16[5,8,64]")
    assert not differences(BLOCK(other), program.module()(other))


def test_a_second_run_changes_nothing() -> None:
    traced = fx.symbolic_trace(BLOCK)
    fxpass.rewrite(traced, X, **REFERENCE)
    once = str(traced.graph)
    report = fxpass.rewrite(traced, **REFERENCE)
    assert not report.rewritten
    assert not report.declined
    assert str(traced.graph) == once


# --- modules called as such ------------------------------------------------------------------


class Leaf(torch.nn.Module):
    """Calls a module between the two halves of a norm."""

    def __init__(self, module: torch.nn.Module, write: bool) -> None:
        super().__init__()
        self.module, self.write = module, write

    def forward(self, x):
        h = x.sin()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        seen = self.module(h)
        if self.write:
            seen.add_(1)
        return h * inverse


@pytest.mark.parametrize(
    ("module", "write"), [(torch.nn.ReLU(inplace=True), False), (torch.nn.Identity(), True)]
)
def test_modules_that_write_or_alias(module: torch.nn.Module, write: bool) -> None:
    model, x = Leaf(module, write), X.float()
    traced = fx.symbolic_trace(model)
    report = fxpass.rewrite(traced, x, **REFERENCE)
    (declined,) = report.declined
    assert "writes in place" in declined.reason
    assert not differences(model(x), traced(x))


# --- gradients -------------------------------------------------------------------------------


def inverse_without_gradient(x):
    with torch.no_grad():
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * inverse


def norm_without_gradient(x):
    y = x.sin()
    with torch.no_grad():
        h = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h * x


@pytest.mark.parametrize("function", [inverse_without_gradient, norm_without_gradient])
def test_grad_mode_is_not_crossed(function) -> None:
    x = tensor("!f32[2,8,64]")
    level = capture(function, [x], aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert "switches grad mode" in report.declined[0].reason
    (wanted,) = torch.autograd.grad(function(x).sum(), x)
    (found,) = torch.autograd.grad(level.graph_module(x)[0].sum(), x)
    assert torch.equal(wanted, found)


def test_learned_eps_keeps_its_gradient() -> None:
    x, eps = tensor("!f32[2,8,64]"), torch.tensor(0.5, requires_grad=True)
    level = capture(unit, [x, eps], aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert "eps needs a gradient" in report.declined[0].reason


def residual(x, r, w):
    h = x + r
    return llama(h, w) * h


def bias_and_inverse(x, w, b):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (x * inverse * w + b) * inverse


def gemma(x, w):
    return (unit(x) * (1 + w.float())).to(x.dtype)


GRADIENTS = {
    "llama": (llama, "!bf16[2,8,64]", "!bf16[64]"),
    "gemma": (gemma, "!bf16[2,8,64]", "!bf16[64]"),
    "residual": (residual, "!bf16[2,8,64]", "!bf16[2,8,64]", "!bf16[64]"),
    "bias_and_inverse": (bias_and_inverse, "!f32[2,8,64]", "!f32[64]", "!f32[64]"),
    "functional": (
        lambda x, w: torch.nn.functional.rms_norm(x, (64,), w, 1e-6),
        "!f32[2,8,64]", "!f32[64]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_a_rewritten_dynamo_graph(name: str) -> None:
    function, *texts = GRADIENTS[name]
    inputs = tensors(*texts)
    level = capture(function, inputs, aten=False).levels[-1]
    names = [n.name for n in level.graph_module.graph.nodes if n.op == "placeholder"]
    assert len(names) == len(inputs)
    wanted = torch.autograd.grad(function(*inputs).float().square().sum(), inputs)
    assert len(fxpass.rewrite(level.graph_module, **REFERENCE).rewritten) == 1
    placed = {n: inputs[int(n.split("_")[-2])] for n in names}
    result = level.graph_module(*(placed[n] for n in names))[0]
    found = torch.autograd.grad(result.float().square().sum(), inputs)
    for a, b in zip(wanted, found, strict=True):
        # The same chain of operators, but gradients that meet in x are added in another order.
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("name", GRADIENTS)
def test_training_graphs_keep_their_values(name: str) -> None:
    function, *texts = GRADIENTS[name]
    captured = capture(function, tensors(*texts))
    captured.result.float().sum().backward()
    forward = captured.graphs("aten")[0]
    assert not changed(forward)
    for level in captured.graphs("aten")[1:]:
        assert not changed(level)


def heads_of_unknown_size(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.view(x.shape[0], x.shape[1], -1, 16).transpose(1, 2).float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype)


def test_strides_known_only_at_run_time_are_declined() -> None:
    # s6 == s69 // (s69 // 16) holds by a guard alone, so the strides cannot be compared.
    inputs = tensors("bf16[2,8,96]", "bf16[16]")
    level = capture(heads_of_unknown_size, inputs, dynamic=True).levels[-1]
    _, report = rewritten(level)
    assert not report.rewritten
    assert [miss.reason for miss in report.declined] == [
        "the result's strides are known only at run time"
    ]
    assert not changed(level)


def test_rewrite_inside_a_dynamo_backend() -> None:
    # Dynamo gives backends a fake mode of their own, other than the graph's.
    reports = []

    def backend(graph_module: fx.GraphModule, _: object) -> object:
        reports.append(fxpass.rewrite(graph_module, **REFERENCE))
        return graph_module.forward

    (x,) = tensors("f32[4,64]")
    torch.compile(
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), backend=backend
    )(x)
    assert [len(report.rewritten) for report in reports] == [1]


def test_rewrite_visits_the_bodies_of_checkpoints() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)

    reports = []

    def backend(graph_module: fx.GraphModule, _: object) -> object:
        reports.append(fxpass.rewrite(graph_module, **REFERENCE))
        return graph_module.forward

    (x,) = tensors("f32[4,64]")
    out = torch.compile(checkpointed, backend=backend)(x)
    assert sum(len(report.rewritten) for report in reports) == 1
    torch.testing.assert_close(out, body(x), rtol=0, atol=0)


WEIGHTED = {
    "the_same_norm_twice": lambda x, w: (weighted(x, w), weighted(x, w)),
    "a_clone": lambda x, w: (lambda o: (o, o.clone()))(weighted(x, w)),
    "sums_made_twice": lambda x, w: (lambda a, b: (weighted(a, w), weighted(b, w), a, b))(
        x + x.sin(), x + x.sin()
    ),
    "a_sum_and_a_copy_in_its_own_dtype": lambda x, w: (lambda a, b: (weighted(b, w), a, b))(
        *(lambda a: (a, a.to(a.dtype, copy=True)))(x + x.sin())
    ),
    "a_factor_and_a_copy": lambda x, w: (lambda a, b: (x * b, a, b))(
        *(lambda a: (a, a.to(a.dtype, copy=True)))(
            torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        )
    ),
}


def weighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * unit(x).to(w.dtype)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("at_aten", [False, True])
def test_tensors_that_eager_keeps_apart_share_no_memory(name: str, at_aten: bool) -> None:
    inputs = tensors("bf16[4,64]", "bf16[64]")
    level = capture(WEIGHTED[name], inputs, aten=at_aten).levels[-1]
    assert fxpass.rewrite(level.graph_module, **REFERENCE).rewritten
    results = level.graph_module(*level.inputs)
    addresses = [result.data_ptr() for result in results]
    assert len(set(addresses)) == len(addresses)


def test_a_write_through_a_list_of_tensors_is_seen() -> None:
    def scaled_inside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.clone()
        variance = h.float().pow(2).mean(-1, keepdim=True)
        torch._foreach_mul_([h], 2.0)
        return (h.float() * torch.rsqrt(variance + 1e-6)).to(w.dtype) * w

    inputs = tensors("bf16[4,64]", "bf16[64]")
    level = capture(scaled_inside, inputs, aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert not report.rewritten
    assert "writes in place" in report.declined[0].reason


BODIES = {
    "its input": (lambda t: t.add_(1).cos(), True),
    "a view of its input": (lambda t: t.view(-1)[2:].zero_().cos(), True),
    "what it makes itself": (lambda t: t.cos().add_(1), False),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_write_inside_a_checkpoint_is_seen(name: str) -> None:
    body, writes = BODIES[name]

    def norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x.sin()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        beside = torch.utils.checkpoint.checkpoint(body, h, use_reentrant=False)
        return h * inverse, beside

    level = capture(norm, tensors("f32[4,64]"), aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert len(report.rewritten) == (not writes)
    assert all("writes in place" in miss.reason for miss in report.declined)


@pytest.mark.parametrize("later", [True, False])
def test_an_addend_that_is_written_later_is_not_kept_for_backward(later: bool) -> None:
    def norm(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual = y * 2
        out = unit(x + residual)
        return out, residual.add_(1) if later else residual

    inputs = [t.requires_grad_() for t in tensors("f32[4,64]", "f32[4,64]")]
    level = capture(norm, inputs, aten=False).levels[-1]
    (site,) = fxpass.rewrite(level.graph_module, **REFERENCE).rewritten
    assert ("residual=" in site.spec) == (not later)
    placed = [n.name for n in level.graph_module.graph.nodes if n.op == "placeholder"]
    results = level.graph_module(*(inputs[int(name.split("_")[-2])] for name in placed))
    found = torch.autograd.grad(sum(r.sum() for r in results), inputs)
    wanted = torch.autograd.grad(sum(r.sum() for r in norm(*inputs)), inputs)
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_a_zero_row_is_torchs() -> None:
    def normalize(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    (x,) = tensors("f32[4,64]")
    x[1] = 0
    x.requires_grad_()
    level = capture(normalize, [x], aten=False).levels[-1]
    assert fxpass.rewrite(level.graph_module, **REFERENCE).rewritten
    (found,) = torch.autograd.grad(level.graph_module(x)[0].sum(), x)
    (wanted,) = torch.autograd.grad(normalize(x).sum(), x)
    torch.testing.assert_close(found, wanted)


class OneNorm(torch.nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(64)
        self.by_name = by_name

    def forward(self, x):
        return (self.norm(x=x) if self.by_name else self.norm(x)) + 1


def test_a_module_that_is_called_by_name_is_opened() -> None:
    traced, x = fx.symbolic_trace(OneNorm(by_name=True)), torch.randn(4, 64)
    wanted = traced(x)
    assert len(fxpass.rewrite(traced, x, **REFERENCE).rewritten) == 1
    assert torch.equal(traced(x), wanted)


def _forward_of_its_own(norm: torch.nn.RMSNorm, calls: list[int]) -> None:
    norm.forward = lambda x: x * norm.weight * 3


def _another_class_method(norm: torch.nn.RMSNorm, calls: list[int]) -> None:
    norm.__class__ = type("RMSNorm", (torch.nn.RMSNorm,), {"forward": lambda self, x: x * 2})


def _backward_hook(norm: torch.nn.RMSNorm, calls: list[int]) -> None:
    norm.register_full_backward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize(
    "change", [None, _forward_of_its_own, _another_class_method, _backward_hook]
)
def test_a_changed_module_stays_a_module(change) -> None:
    model, calls = OneNorm(by_name=False), []
    if change is not None:
        change(model.norm, calls)
    traced, x = fx.symbolic_trace(model), torch.randn(4, 64, requires_grad=True)
    wanted = traced(x)
    assert len(fxpass.rewrite(traced, x, **REFERENCE).rewritten) == (change is None)
    assert torch.equal(traced(x), wanted)
    traced(x).sum().backward()
    assert bool(calls) == (change is _backward_hook)


@pytest.mark.parametrize(("order", "dims"), [(2, (-2, -1)), ("nuc", (-2, -1)), (1, -1), (2.5, -1)])
def test_in_a_graph_of_export_no_other_norm_is_taken_for_the_root_of_a_sum_of_squares(order, dims):
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / torch.linalg.norm(x, ord=order, dim=dims, keepdim=True)

    x = torch.randn(3, 4, 8)
    graph_module = torch.export.export(Scaled(), (x,)).module()
    wanted = graph_module(x)
    report = fxpass.rewrite(graph_module, x)
    assert not report.rewritten
    assert torch.equal(graph_module(x), wanted)


def test_in_a_graph_of_export_a_vector_norm_is_found():
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / torch.linalg.norm(x, ord=2, dim=-1, keepdim=True)

    x = torch.randn(3, 4, 8)
    graph_module = torch.export.export(Scaled(), (x,)).module()
    assert "linalg_norm" in str(graph_module.graph)
    assert len(fxpass.rewrite(graph_module, x).rewritten) == 1


TRANSFORMS = {
    "vmap": lambda x: torch.vmap(unit)(x),
    "grad": lambda x: torch.func.grad(lambda y: unit(y).sin().sum())(x),
    "jvp": lambda x: torch.func.jvp(unit, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_norm_inside_a_transform_is_declined(name: str) -> None:
    """Dynamo's graph has the transform as calls around the norm, which would get its tensors."""
    inputs = tensors("f32[4,64]")
    level = capture(TRANSFORMS[name], inputs, aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert not report.rewritten
    assert any("inside a torch.func transform" in miss.reason for miss in report.declined)
    assert not report.errors


def test_a_hook_on_all_modules_is_kept() -> None:
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        traced, x = fx.symbolic_trace(OneNorm(by_name=False)), torch.randn(4, 64)
        assert not fxpass.rewrite(traced, x, **REFERENCE).rewritten
        seen.clear()
        traced.norm(x)
        assert seen
    finally:
        handle.remove()


def test_torchs_own_norm_patched_before_us_is_not_opened() -> None:
    with mock.patch.object(torch.nn.RMSNorm, "forward", lambda self, x: x * 2):
        traced, x = fx.symbolic_trace(OneNorm(by_name=False)), torch.randn(4, 64)
        assert not fxpass.rewrite(traced, x, **REFERENCE).rewritten


def test_example_inputs_do_not_count_as_a_batch() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = torch.nn.BatchNorm1d(64)

        def forward(self, x):
            return unit(self.batch_norm(x))

    traced = fx.symbolic_trace(Counts())
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    assert len(fxpass.rewrite(traced, torch.randn(4, 64), **REFERENCE).rewritten) == 1
    for name, value in traced.state_dict().items():
        assert torch.equal(value, before[name]), name


def _row_without_a_gradient(x, w):
    with torch.no_grad():
        row = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * row * w.sin()


def _input_written_later(x, w):
    h = x * 2
    out = (unit(h.float()) * w).to(h.dtype)
    return out, h.add_(1)


@pytest.mark.parametrize(
    ("function", "dtype", "reason"),
    [
        (_row_without_a_gradient, "f32", "switches grad mode"),
        (_input_written_later, "bf16", "backward would read"),
    ],
)
def test_gradients_are_declined_where_ours_would_be_others(function, dtype: str, reason: str):
    inputs = [t.requires_grad_() for t in tensors(f"{dtype}[4,64]", f"{dtype}[64]")]
    level = capture(function, inputs, aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert not report.rewritten
    assert any(reason in miss.reason for miss in report.declined)


def test_a_weight_of_a_transform_is_declined() -> None:
    def gradient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda v: (unit(x) * v).sin().sum())(w)

    level = capture(gradient, tensors("f32[4,64]", "f32[64]"), aten=False).levels[-1]
    report = fxpass.rewrite(level.graph_module, **REFERENCE)
    assert not report.rewritten
    assert not report.errors


def _opaque(h: torch.Tensor) -> torch.Tensor:
    return h.add_(1)


fx.wrap("_opaque")


def test_code_that_is_not_torchs_may_write() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h * inverse + _opaque(h)

    graph_module = fx.symbolic_trace(norm)
    report = fxpass.rewrite(graph_module, torch.randn(4, 64), **REFERENCE)
    assert len(report.rewritten) == 1  # what comes after the norm is not between its halves

    def between(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        seen = _opaque(h)
        return h * inverse + seen

    report = fxpass.rewrite(fx.symbolic_trace(between), torch.randn(4, 64), **REFERENCE)
    assert not report.rewritten
    assert "writes in place" in report.declined[0].reason
