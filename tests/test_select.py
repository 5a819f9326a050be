"""Which kernel a site gets, and that every refusal keeps its reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases_rounding import unit
from helpers import capture, changed, rewritten, tensors

import fxpass
from fxpass.kernels import Hidden, Kernel, kernels, reference, register, unregister
from fxpass.options import Options
from fxpass.spec import Inverse, Rounding


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
