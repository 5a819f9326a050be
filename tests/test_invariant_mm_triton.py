"""Batch-invariant products without a GPU: meaning in the interpreter, machine code, chunks."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from triton_offline import interpreter as interpreted
from triton_offline import own_cache  # noqa: F401 - a fixture

from fxpass.kernels.invariant import chunks, mm_gpu, mm_launch
from fxpass.kernels.invariant.mm_schedule import Device, Problem, Schedule, pick

triton = pytest.importorskip("triton")

from fxpass.kernels.invariant import mm_triton  # noqa: E402 - needs Triton

HERE = Path(__file__).parent
H200 = ("cuda", 90, 32)
TARGETS = [("cuda", 80, 32), H200, ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)]
DEVICES = {
    80: Device("nvidia", 8, 108, 163 << 10),
    89: Device("nvidia", 8, 128, 99 << 10),
    90: Device("nvidia", 9, 132, 227 << 10),
    100: Device("nvidia", 10, 148, 227 << 10),
    "gfx942": Device("amd", 9, 304, 64 << 10),
    "gfx950": Device("amd", 9, 256, 64 << 10),
}
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
ROWS = (1, 64, 128, 256, 512, 4096)
SHAPES = ((4096, 4096), (4096, 6144), (4096, 151_936), (4096, 1024), (64, 64))


interpreter = interpreted("invariant_mm_interpreted.py")


# ---- Which sums ----------------------------------------------------------------------------------


def test_chunks():
    for k in (1, 127, 128, 1024, 1025, 4096, 14_336, 53_248):
        for n in (1, 64, 1024, 4096, 6144, 8192, 151_936):
            chunk = chunks.mm_chunk(k, n, torch.bfloat16)
            assert chunk % chunks.UNIT == 0
            assert chunk >= min(k, 1024)
            batched = chunks.mm_chunk(k, n, torch.bfloat16, batched=True)
            assert batched == chunks.BATCHED_CHUNK


def problem(m, n, k, batch=1, bits=16, exact=False, tma=True, out_bits=0, full_bias=False):
    chunk = chunks.mm_chunk(k, n, torch.bfloat16, batched=batch > 1)
    return Problem(m, n, k, batch, chunk, bits, out_bits or bits, exact, tma, full_bias)


def every_schedule(device: Device, shapes=SHAPES) -> set[tuple[Schedule, bool, int, bool]]:
    """All that is picked for ROWS and shapes: (schedule, one chunk, bits, exact)."""
    found = set()
    tf32 = [(32, False)] if device.family == "nvidia" else []
    for bits, exact in ((16, False), *tf32, (32, True)):
        for k, n in shapes:
            for m in ROWS:
                for batch, tma in ((1, True), (1, False), (8, False)):
                    given = problem(m, n, k, batch, bits, exact, tma and bits == 16)
                    found.add((pick(device, given), given.chunks == 1, bits, exact))
    return found


@pytest.mark.parametrize("device", DEVICES.values(), ids=map(str, DEVICES))
def test_schedules_keep_to_the_chunks(device):
    """A block of K ends where a chunk does, and descriptors are used only where they can be."""
    for k, n in SHAPES:
        for m in ROWS:
            for tma in (True, False):
                given = problem(m, n, k, tma=tma)
                schedule = pick(device, given)
                assert given.chunk % schedule.block_k == 0
                assert schedule.kind != "tma" or (tma and device.major == 9 and given.chunks == 1)
                assert schedule.kind != "split" or given.chunks > 1
                assert schedule.kind in ("walk", "split", "tma")


@pytest.mark.parametrize("name", [100, "gfx942", "gfx950"])
def test_one_tile_where_instructions_may_differ(name):
    for bits in (16, 32):
        found = {
            schedule[1:4]
            for schedule, _, other, exact in every_schedule(DEVICES[name])
            if other == bits and (name != 100 or not exact)
        }
        assert len(found) == 1


# ---- What it compiles to -------------------------------------------------------------------------

TYPES = {16: "bf16", 32: "fp32"}


def compiled(schedule: Schedule, single: bool, bits: int, exact: bool, target, out=None, **changed):
    """The kernel of a schedule for a transposed weight and aligned operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    split = schedule.kind == "split"
    constants = {
        "CHUNK": 1024,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
        "GROUP": schedule.group,
        "SPLIT": split,
        "SINGLE": single,
        "EVEN_K": True,
        "WIDE": False,
        "HAS_BIAS": False,
        "FULL_BIAS": False,
        "PRECISION": "ieee" if exact or bits == 16 else "tf32",
        "PDL": split and target[0] == "cuda" and target[1] >= 90,
        "A_TRANSPOSED": False,
        "B_TRANSPOSED": True,
        "a_col": 1,
        "b_row": 1,
        "bias_col": 1,
        **changed,
    }
    dtype = TYPES[bits]
    tma = schedule.kind == "tma"
    kernel = mm_triton.product_tma if tma else mm_triton.product
    pointer = f"*{dtype}"
    types = {"a": pointer, "b": pointer, "bias": pointer, "out": "*fp32" if split else pointer}
    if tma:
        blocks = mm_launch.blocks(schedule, (False, True))
        for name, block in zip(("a", "b", "out"), blocks, strict=True):
            kept = out if out and name == "out" else dtype
            types[name] = f"tensordesc<{kept}[{block[0]},{block[1]}]>"
    types |= {"alpha": "fp32", "beta": "fp32"}
    signature, given, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], given[name] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if name not in ("m", "alpha", "beta") and not signature[name].startswith("tensordesc"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    if target[0] == "hip":
        options["matrix_instr_nonkdim"] = 16
    source = ASTSource(kernel, signature, given, attributes)
    return triton.compile(source, target=GPUTarget(*target), options=options)


@each_target
def test_every_schedule_compiles(target):
    device = DEVICES[target[1]]
    shapes = SHAPES if target == H200 else SHAPES[3:4]
    for schedule, single, bits, exact in sorted(every_schedule(device, shapes), key=str):
        found = compiled(schedule, single, bits, exact, target)
        assert found.metadata.shared <= device.shared, schedule
        if target[0] == "hip":
            assert found.asm["hsaco"].startswith(b"\x7fELF")
        else:
            assert found.asm["ptx"]


@pytest.mark.parametrize("out_bits", [16, 32])
@pytest.mark.parametrize("full_bias", [False, True])
def test_descriptors_leave_room_for_the_epilogue(out_bits, full_bias):
    found = set()
    for m, n in itertools.product((64, 256, 512, 4096), (4096, 14_336)):
        given = problem(m, n, 4096, out_bits=out_bits, full_bias=full_bias)
        found.add(pick(DEVICES[90], given))
    for schedule in found:
        made = compiled(
            schedule,
            True,
            16,
            False,
            H200,
            out=TYPES[out_bits],
            HAS_BIAS=True,
            FULL_BIAS=full_bias,
        )
        assert schedule.kind == "tma"
        assert made.metadata.shared <= DEVICES[90].shared, schedule


@each_target
def test_finish_compiles(target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pdl = target[0] == "cuda" and target[1] >= 90
    constants = {"CHUNKS": 4, "BLOCK": 1024, "HAS_BIAS": True, "PDL": pdl, "bias_col": 1}
    pointers = {"sums": "*fp32", "bias": "*bf16", "out": "*bf16", "alpha": "fp32", "beta": "fp32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in mm_triton.finish.arg_names
    }
    found = triton.compile(
        ASTSource(mm_triton.finish, signature, constants), target=GPUTarget(*target)
    )
    assert found.asm["hsaco" if target[0] == "hip" else "ptx"]


@pytest.mark.parametrize("target", TARGETS[3:], ids=lambda target: target[1])
def test_amd_uses_one_matrix_instruction(target):
    """Instructions of another shape add other elements of K at once."""
    for bits in (16, 32):
        names = set()
        for schedule, single, found, exact in every_schedule(DEVICES[target[1]]):
            if found == bits:
                text = compiled(schedule, single, bits, exact, target).asm["amdgcn"]
                names |= set(re.findall(r"v_mfma_\w+", text))
        assert len(names) == 1, names


def test_products_of_floats_are_fused_multiply_adds():
    """True float32: one chain of fma per element, nothing a tensor core would do."""
    for schedule, single, _, exact in every_schedule(DEVICES[90]):
        if exact:
            ptx = compiled(schedule, single, 32, True, H200).asm["ptx"]
            assert "fma.rn.f32" in ptx
            assert not re.search(r"mma\.", ptx)


def test_loads_stay_asynchronous_across_chunks():
    """The end of a chunk is inside the loop, and only there is a product waited for."""
    for schedule, single, bits, _ in every_schedule(DEVICES[90]):
        if schedule.kind == "tma":
            ptx = compiled(schedule, single, bits, False, H200).asm["ptx"]
            assert "wgmma.wait_group.sync.aligned 1" in ptx, schedule


# ---- Calls ---------------------------------------------------------------------------------------


def test_bits_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0, printed


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        (TypeError, "a is torch.float64, needs", {"a": torch.zeros(2, 3).double()}),
        (TypeError, "b is torch.int8, needs", {"b": torch.zeros(3, 4, dtype=torch.int8)}),
        (TypeError, "b is torch.float16 on cpu, needs", {"b": torch.zeros(3, 4).half()}),
        (TypeError, "out_dtype is torch.float64", {"out_dtype": torch.float64}),
        (TypeError, "bias is torch.int64", {"bias": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, r"bias's shape \(3,\) does not", {"bias": torch.zeros(3)}),
        (ValueError, r"bias's shape \(1, 2, 4\) does not", {"bias": torch.zeros(1, 2, 4)}),
        (ValueError, "do not fit", {"b": torch.zeros(2, 4)}),
        (ValueError, "do not fit", {"b": torch.zeros(1, 3, 4)}),
        (ValueError, "do not fit", {"a": torch.zeros(3), "b": torch.zeros(3)}),
    ],
)
def test_wrong_operands_are_refused(kind, text, change):
    given = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 4), **change}
    with pytest.raises(kind, match=text):
        mm_gpu.matmul(given.pop("a"), given.pop("b"), given.pop("bias", None), **given)
