"""Which kernel a site gets, and that every refusal keeps its reason."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from cases_rounding import unit
from helpers import capture, changed, rewritten, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fxpass
from fxpass import pipeline, platforms, torch_inductor
from fxpass.kernels import (
    Hidden,
    Kernel,
    by_name,
    kernels,
    reference,
    register,
    registry,
    unregister,
)
from fxpass.options import Options
from fxpass.spec import Inverse, Rounding
from fxpass.torch_private import inside_inductor


def llama(x, w):
    return w * unit(x).to(w.dtype)


@pytest.fixture(scope="module")
def level():
    with torch.no_grad():
        return capture(llama, tensors("bf16[2,8,64]", "bf16[64]")).graphs("aten")[-1]


def _offer(name: str, **changes):
    contract = dataclasses.replace(reference.CONTRACT, **changes)
    return register(Kernel(f"testing.{name}", contract, reference.launch))


REFUSALS = {
    "platform": ({"platforms": ("rocm",)}, "platform cpu, needs rocm"),
    "dtype": ({"x": (torch.float32,)}, "x is bf16, needs f32"),
    "hidden_most": ({"hidden": Hidden(1, 32)}, "hidden 64 > 32"),
    "hidden_least": ({"hidden": Hidden(128)}, "hidden 64 < 128"),
    "rounding": (
        {"rounding": (Rounding.SCALE_THEN_CAST,)},
        "rounding cast_then_scale, needs scale_then_cast",
    ),
    "inverse": ({"inverse": (Inverse.DIVIDE_BY_SQRT,)}, "inverse rsqrt, needs x/sqrt"),
    "weight": ({"weight": ("none",)}, "weight is same, needs none"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_kept_with_their_reason(name: str, level) -> None:
    changes, reason = REFUSALS[name]
    kernel = _offer(name, **changes)
    try:
        options = Options(providers=(kernel.name, "reference"))
        _, report = rewritten(level, options)
    finally:
        unregister(kernel.name)
    (site,) = report.rewritten
    assert site.kernel == "reference.eager"
    assert site.refusals == (f"refused {kernel.name}: {reason}",)


def test_no_kernel_left_means_no_rewrite(level) -> None:
    kernel = _offer("nothing", platforms=("rocm",))
    try:
        _, report = rewritten(level, Options(providers=(kernel.name,)))
    finally:
        unregister(kernel.name)
    (declined,) = report.declined
    assert "no kernel fits: refused testing.nothing" in declined.reason
    assert not report.rewritten


def test_order_of_providers_is_kept(level) -> None:
    names = [_offer(name).name for name in ("first", "second")]
    try:
        for order in (names, names[::-1]):
            _, report = rewritten(level, Options(providers=tuple(order)))
            assert report.rewritten[0].kernel == order[0]
    finally:
        for name in names:
            unregister(name)


def test_registered_kernels_come_first_and_names_are_unique() -> None:
    kernel = _offer("mine")
    try:
        assert kernels()[0] is kernel
        with pytest.raises(fxpass.FxpassError, match="already registered"):
            register(kernel)
    finally:
        unregister(kernel.name)
    with pytest.raises(fxpass.FxpassError, match="has no provider"):
        register(dataclasses.replace(kernel, name="mine"))


ROUNDING = {
    "scale_then_cast": "element=mul_row:f32,mul_weight:f32,cast:bf16",
    "cast_then_scale": "element=mul_row:f32,cast:bf16,mul_weight:bf16",
}


@pytest.mark.parametrize("rounding", ROUNDING)
def test_rounding_is_changed_only_by_request(rounding: str, level) -> None:
    options = Options(providers=("reference",), rounding=rounding)
    _, report = rewritten(level, options)
    (site,) = report.rewritten
    assert ROUNDING[rounding] in site.spec
    if rounding == "cast_then_scale":
        assert site.numerics == "same roundings, reduction order may differ"
        assert not changed(level, options)
    else:
        assert "cast_then_scale -> scale_then_cast" in site.numerics
        assert changed(level, options)


def test_fuel_takes_the_first_sites(level) -> None:
    def three(x, w):
        return llama(llama(llama(x, w), w), w)

    with torch.no_grad():
        chain = capture(three, tensors("bf16[2,8,64]", "bf16[64]")).graphs("aten")[-1]
    for fuel in (0, 1, 2, 3):
        options = Options(providers=("reference",), fuel=fuel)
        _, report = rewritten(chain, options)
        assert len(report.rewritten) == fuel
        assert len(report.declined) == 3 - fuel
        assert all(miss.reason == f"out of fuel ({fuel})" for miss in report.declined)
        assert not changed(chain, options)


def test_an_override_never_changes_the_dtype() -> None:
    # A float32 weight makes Llama's order return float32; one last cast would make it bf16.
    def promoted(x, w):
        return w * unit(x).to(torch.bfloat16)

    graph = capture(promoted, tensors("bf16[2,8,64]", "f32[64]")).graphs("aten")[0].graph_module
    report = fxpass.rewrite(
        graph, providers=("reference",), rounding="scale_then_cast", strict=True
    )
    assert [site.rounding for site in report.rewritten] == ["cast_then_scale"]


# ---- GPUs: which kernel where, decided on fake tensors -------------------------------------------

BF16 = torch.bfloat16


def _on_gpu(function, *shapes, inside: bool = True, providers=("auto",), dtype=BF16, device="cuda"):
    """The report on a graph captured with fake CUDA tensors."""
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        graph = make_fx(function)(*inputs).graph
    around = inside_inductor() if inside else contextlib.nullcontext()
    with around:
        return pipeline.dry_run(graph, Options(providers=providers, strict=True))


@pytest.fixture
def gpu(monkeypatch) -> None:
    """Pretends that both row kernels can be built here."""
    for name in ("cuda.row", "triton.row"):
        kernel = by_name(name)
        ready = dataclasses.replace(kernel, unavailable=lambda: None)
        monkeypatch.setattr(
            registry, "_BUILT_IN", tuple(ready if k is kernel else k for k in registry._BUILT_IN)
        )


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build asks for the driver")
def test_a_kernel_is_asked_about_the_gpu_of_the_norm(monkeypatch) -> None:
    """Not about the current one, which may be older, or another that has to load the code too."""
    current, asked = [0], []

    @contextlib.contextmanager
    def device(index: int):
        current.append(index)
        yield
        current.pop()

    kernel = by_name("cuda.row")
    ready = dataclasses.replace(kernel, unavailable=lambda: asked.append(current[-1]))
    monkeypatch.setattr(registry, "_BUILT_IN", (ready,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(platforms, "_arch", lambda device: "sm_90")
    for wanted in (1, 0):
        report = _on_gpu(llama, (32, 512), (512,), device=f"cuda:{wanted}", providers=("cuda",))
        assert len(report.rewritten) == 1
        assert asked.pop() == wanted
    assert current == [0]


def _matmul(x, w, v):
    return llama(x, w) @ v


def _gate(x, w, v):
    return (llama(x, w) * torch.nn.functional.silu(v)).unsqueeze(0)


def _rope(x, w, v):
    q = llama(x, w).transpose(0, 1)
    left, right = q.chunk(2, -1)
    return q * v + torch.cat((-right, left), -1) * v


def _quantise(x, w):
    y = llama(x, w)
    return y / y.abs().amax(-1, keepdim=True)


def _one_is_a_matmul(x, w, v, u):
    y = llama(x, w)
    return y * v, y @ u


def _returned(x, w):
    return llama(x, w)


def _next_norm(x, w, r):
    return llama(llama(x, w) + r, w)


def _made(x, w, z):
    return llama(x * torch.nn.functional.silu(z), w) @ x.t()


def _copied(x, w):
    return llama(x, w).cpu()


ROWS, WEIGHT, SQUARE = (24, 64), (64,), (64, 64)
WHERE = {
    "matmul": (_matmul, (ROWS, WEIGHT, SQUARE), ["cuda.row"]),
    "gate": (_gate, (ROWS, WEIGHT, ROWS), ["inductor.fused"]),
    "rope": (_rope, ((24, 4, 64), WEIGHT, (24, 64)), ["inductor.fused"]),
    "quantise": (_quantise, (ROWS, WEIGHT), ["inductor.fused"]),
    "mixed": (_one_is_a_matmul, (ROWS, WEIGHT, ROWS, SQUARE), ["cuda.row"]),
    "returned": (_returned, (ROWS, WEIGHT), ["cuda.row"]),
    "next norm": (_next_norm, (ROWS, WEIGHT, ROWS), ["cuda.row", "cuda.row"]),
    "copied to the CPU": (_copied, (ROWS, WEIGHT), ["cuda.row"]),
    "x made for it": (_made, (ROWS, WEIGHT, ROWS), ["inductor.fused"]),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", WHERE)
def test_on_a_gpu_a_kernel_apart_never_breaks_a_larger_fusion(name: str) -> None:
    function, shapes, wanted = WHERE[name]
    report = _on_gpu(function, *shapes)
    assert [site.kernel for site in report.rewritten] == wanted
    for site in report.rewritten:
        apart = [reason for reason in site.refusals if "platform" not in reason]
        assert len(apart) == (2 if site.kernel == "inductor.fused" else 0)
        assert all("256 bytes a row" in reason for reason in apart)


@pytest.mark.usefixtures("gpu")
def test_a_named_provider_is_taken_at_its_word() -> None:
    function, shapes, _ = WHERE["gate"]
    (site,) = _on_gpu(function, *shapes, providers=("triton",)).rewritten
    assert site.kernel == "triton.row"


@pytest.mark.usefixtures("gpu")
def test_without_inductor_a_gpu_gets_a_kernel_that_runs_alone() -> None:
    function, shapes, _ = WHERE["gate"]
    (site,) = _on_gpu(function, *shapes, inside=False).rewritten
    assert site.kernel == "cuda.row"


@pytest.mark.parametrize(
    ("platform", "chosen"), [("cuda:sm_90", "cuda.row"), ("cuda:sm_75", "triton.row")]
)
def test_a_gpu_too_old_for_a_kernel_that_is_planned_for(level, platform, chosen) -> None:
    options = Options(platform=platform, providers=("cuda", "triton"), strict=True)
    (site,) = pipeline.dry_run(level.graph_module.graph, options).rewritten
    assert site.kernel == chosen
    told = "refused cuda.row: architecture sm_75, needs sm_80"
    assert (told in site.refusals) == (platform == "cuda:sm_75")


@pytest.mark.usefixtures("gpu")
def test_ahead_of_time_only_what_the_package_can_hold(monkeypatch) -> None:
    monkeypatch.setattr(torch_inductor, "compiling_ahead_of_time", lambda: True)
    function, shapes, _ = WHERE["matmul"]
    (site,) = _on_gpu(function, *shapes).rewritten
    assert site.kernel == "triton.row"
    assert (
        "refused cuda.row: opaque: an AOTInductor package must run without fxpass" in site.refusals
    )
    (miss,) = _on_gpu(function, *shapes, providers=("cuda", "reference")).declined
    assert miss.reason.count("opaque") == 2


def test_ahead_of_time_on_the_cpu_leaves_inductors_own_code(level, monkeypatch) -> None:
    monkeypatch.setattr(torch_inductor, "compiling_ahead_of_time", lambda: True)
    monkeypatch.setattr(torch_inductor, "CPP_KEEPS_ROUNDINGS", True)
    graph = level.graph_module.graph
    with inside_inductor():
        (site,) = pipeline.dry_run(graph, Options(strict=True)).rewritten
    assert site.kernel == "inductor.fused"
    refused = [f"refused {kernel.name}" for kernel in kernels()[:-1]]
    assert [reason.split(":")[0] for reason in site.refusals] == refused


@pytest.mark.parametrize("providers", [("auto",), ("inductor",)])
def test_inductors_own_code_needs_roundings_that_stay(level, monkeypatch, providers) -> None:
    monkeypatch.setattr(torch_inductor, "compiling_ahead_of_time", lambda: True)
    monkeypatch.setattr(torch_inductor, "CPP_KEEPS_ROUNDINGS", False)
    with inside_inductor():
        report = pipeline.dry_run(level.graph_module.graph, Options(providers=providers))
    (miss,) = report.declined
    assert "drops roundings, needs torch 2.13" in miss.reason


def test_on_the_cpu_nothing_of_this_applies(level) -> None:
    with inside_inductor():
        (site,) = pipeline.dry_run(level.graph_module.graph, Options(strict=True)).rewritten
    assert site.kernel == "cpu.row"
