"""The GPU reductions without a GPU: bits in Triton's interpreter, and what they compile to."""

import re

import pytest
from triton_offline import (
    TARGETS,
    assert_machine_code,
    compiled,
    own_cache,  # noqa: F401 - a fixture
)
from triton_offline import interpreter as interpreted

from fxpass.kernels import gpu_rows
from fxpass.kernels.invariant import reduce_gpu

triton = pytest.importorskip("triton")

ids = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
H200 = TARGETS[1]
PLACE = {"rows": "i32", "size": "i32", "x_outer": "i32", "x_step": "i32"}
NUMBERS = {"factor": "i64", "power": "i64", "eps": "i64"}
KERNELS = {
    "row_sum": [
        {"KIND": kind, "ROOT": kind in ("square", "power")}
        for kind in ("", "abs", "square", "nonzero", "power")
    ],
    "row_extreme": [{"SIGN": 1}, {"SIGN": -1}],
    "row_softmax": [{"KIND": kind} for kind in ("softmax", "log_softmax", "logsumexp")],
    "row_moments": [
        {"NORM": True, "WEIGHT": True, "BIAS": True},
        {"NORM": False, "WEIGHT": False, "BIAS": False},
    ],
}


interpreter = interpreted("invariant_reduce_interpreted.py")


def built(name, size, target, dtype="bf16", **meta):
    """The kernel for aligned rows with one leading dim."""
    from fxpass.kernels.invariant import reduce_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    together, warps = reduce_gpu.schedule(size, 1000)
    levels = (gpu_rows.lanes(size) // 8).bit_length() - 1
    last = 5 if together == 1 and warps > 1 and levels > 5 else 0
    kernel = getattr(reduce_triton, name)
    constants = {
        "inner": 1,
        "ROWS": together,
        "LANES": gpu_rows.lanes(size),
        "LEVELS": levels - last,
        "LAST": last,
        "KEPT": size <= gpu_rows.MOST_LANES,
        "WIDE": dtype == "fp64",
        **meta,
    }
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    types = PLACE | {"x": f"*{dtype}", "out": f"*{dtype}", "weight": f"*{dtype}", "bias": wide}
    types |= {"first": wide, "second": wide, **NUMBERS}
    found = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return compiled(kernel, types, found, target, num_warps=warps, **FIXED)


@ids
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles(name, target):
    for meta in KERNELS[name]:
        assert_machine_code(built(name, 1024, target, **meta), target)
    assert_machine_code(built(name, 24, target, dtype="fp64", **KERNELS[name][-1]), target)
    for size in (24, 152_064):
        assert_machine_code(built(name, size, target, **KERNELS[name][0]), target)


@ids
def test_scan_compiles(target):
    from fxpass.kernels.invariant import scan_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    for levels, together, warps in ((11, 1, 4), (3, 64, 1)):
        constants = {"inner": 1, "ROWS": together, "LEVELS": levels, "WIDE": False}
        types = PLACE | {"x": "*bf16", "out": "*bf16"}
        found = compiled(
            scan_triton.row_cumsum,
            types,
            constants,
            target,
            num_warps=warps,
            **FIXED,
        )
        assert_machine_code(found, target)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_contracted(name):
    """A fused multiply-add stands only where the source has one: in exp."""
    for meta in KERNELS[name]:
        if "power" in meta.values():
            continue  # float64's exp and log are a library's
        found = built(name, 1024, H200, **meta)
        fused = set(re.findall(r"^\s*(fma\.\S+)", found.asm["ptx"], re.MULTILINE))
        assert fused <= ({"fma.rn.f32"} if name == "row_softmax" else set())
        assert not re.search(r"\b(?:mul|add|sub)\.f32", found.asm["ptx"])  # rn: not to be fused


@pytest.mark.parametrize("name", KERNELS)
def test_reads_16_bytes(name):
    for meta in KERNELS[name]:
        for size in (1024, 8192, 152_064):
            ptx = built(name, size, H200, **meta).asm["ptx"]
            reads = set(re.findall(r"ld\.global\.(\S+)", ptx))
            assert "v4.b32" in reads, reads


def test_bits_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0, printed
