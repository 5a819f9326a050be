"""`triton.row`: its bits in Triton's interpreter, and what Triton compiles it to, without a GPU."""

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_cases import LLAMA, SPECS, inputs
from triton_cases import MORE_SPECS
from triton_offline import interpreter as interpreted
from triton_offline import own_cache  # noqa: F401 - a fixture

from fxpass.kernels import steps, triton_call, triton_row, triton_source, triton_words
from fxpass.spec import NormSpec

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
ALL = {**SPECS, **MORE_SPECS}
H200 = ("cuda", 90, 32)
TARGETS = [("cuda", 80, 32), H200, ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


interpreter = interpreted("triton_interpreted.py")


# ---- What it compiles to -------------------------------------------------------------------------


def compiled(spec: NormSpec, hidden: int, target=H200, rows: int | None = None, **options):
    """The kernel for aligned tensors, with one leading dim and one weight row."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = triton_row.inline(spec, hidden, rows)
    dtypes = {"x": spec.x, "residual": spec.residual, "weight": spec.weight, "bias": spec.bias}
    dtypes |= {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(found.parameters):
        if name in dtypes or name.endswith(("_outer", "_step")):
            signature[name] = POINTERS[dtypes[name]] if name in dtypes else "i64"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in ("inner", "weight_rows", "bias_rows"):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name == "eps" else "i64"
    return triton.compile(
        ASTSource(found.kernel, signature, constants, attributes),
        target=GPUTarget(*target),
        options={"num_warps": found.num_warps, **options},
    )


def assert_machine_code(found, target):
    """For AMD GPUs a code object of the right architecture; ptxas for NVIDIA ones is not asked."""
    backend, arch, wave = target
    if backend == "hip":
        assert found.asm["hsaco"].startswith(b"\x7fELF")
        assert re.search(rf'amdgcn_target "[^"]*-{arch}"', found.asm["amdgcn"])
        assert f".wavefront_size: {wave}" in found.asm["amdgcn"]
    else:
        assert found.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS[2:], ids=lambda target: str(target[1]))
def test_every_spec_compiles(target):
    """For older NVIDIA GPUs, test_no_rounding_is_contracted_away."""
    for text in ALL.values():
        assert_machine_code(compiled(NormSpec.parse(text), 1000, target), target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_every_schedule_compiles(target):
    for hidden in (1, 24, 256, 512, 1024, 5120, 8192, 12_288, 65_536):
        for rows in (None, 1, 1 << 28) if target == H200 else (None,):
            assert_machine_code(compiled(NormSpec.parse(LLAMA), hidden, target, rows), target)


@pytest.mark.parametrize("hidden", [64, 256, 512, 2048, 2880, 4096, 5120, 8192, 16_384])
@pytest.mark.parametrize("rows", [None, 1])
def test_reads_and_writes_16_bytes(hidden, rows):
    ptx = compiled(NormSpec.parse(LLAMA), hidden, rows=rows).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global\.\S+", ptx)
    assert {access[3:] for access in accesses} == {"global.v4.b32"}, accesses


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_what_is_far_larger_than_the_l2_is_evicted_last(target):
    spec, hidden = NormSpec.parse(SPECS["residual"]), 4096
    least = -(-256_000_000 // (4 * 2 * hidden))  # x, residual, out and sum
    for rows in (None, least - 1):
        assert not triton_row.schedule(spec, hidden, rows).last
    found = compiled(spec, hidden, target, least)
    assert_machine_code(found, target)
    if target[0] == "cuda":
        loads = re.findall(r"ld\.global\S+", found.asm["ptx"])
        # Not the weight, of which every row reads the same.
        assert sum("evict_last" in load for load in loads) == 2 * len(loads) // 3


def test_schedules_with_one_text_share_a_kernel():
    spec = NormSpec.parse(LLAMA)
    few, many = (triton_row.inline(spec, 4096, rows) for rows in (1, 1000))
    assert few.num_warps != many.num_warps
    assert few.kernel is many.kernel


@pytest.mark.parametrize("hidden", [128, 256, 512])
def test_short_rows_need_no_shared_memory(hidden):
    assert "bar.sync" not in compiled(NormSpec.parse(LLAMA), hidden).asm["ptx"]


@pytest.mark.parametrize("hidden", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("rows", [None, 1])
def test_warps_meet_once(hidden, rows):
    ptx = compiled(NormSpec.parse(LLAMA), hidden, rows=rows).asm["ptx"]
    assert ptx.count("bar.sync") == ptx.count("ld.shared") == ptx.count("st.shared") == 1


@pytest.mark.parametrize(("hidden", "most"), [(2880, 1300), (4096, 1700), (5120, 2000)])
def test_instructions_of_a_row(hidden, most):
    """Of all warps. Elements that a padded row lacks cost as many as others."""
    found = compiled(NormSpec.parse(LLAMA), hidden)
    assert len(_INSTRUCTION.findall(found.asm["ptx"])) * found.metadata.num_warps <= most


def test_one_weight_row_is_not_divided_by():
    ptx = compiled(NormSpec.parse(LLAMA), 4096).asm["ptx"]
    assert not re.search(r"\b(?:rem|div)\.[su]", ptx)


# ---- No contraction ------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z]\S*)\s+([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"%\w+|0f[0-9A-F]{8}")
_MINUS_ZERO = ("0f80000000", "0x8000", "-2147450880")  # in f32, bf16, a pair of bf16
_ONE = ("0x3F80", "1065369472")


def contractions(ptx: str) -> list[str]:
    """Where a rounding of the source is missing, or the assembler might drop it.

    A fused multiply-add is a square added to the sum of its lane, or its addend is minus zero, or
    (on GPUs that have no other 16-bit addition) a factor is one. A product that is not rounded
    explicitly may not feed an addition, or ptxas fuses the two.
    """
    lines = [(op, rest, _REGISTER.findall(rest)) for op, rest in _INSTRUCTION.findall(ptx)]

    def holding(constants):
        return {r[0] for op, rest, r in lines if r and set(constants) & set(rest.split(", "))}

    products = {r[0] for op, _, r in lines if re.fullmatch(r"mul\.(f32|bf16|f16)(x2)?", op)}
    zeros, ones = holding(_MINUS_ZERO), holding(_ONE)
    found = []
    for op, rest, registers in lines:
        if op.startswith(("add.", "sub.")) and products & set(registers[1:]):
            found.append(f"{op} {rest}")
        if op.startswith("fma"):
            _, left, right, addend = registers
            if left != right and addend not in zeros and not {left, right} & ones:
                found.append(f"{op} {rest}")
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ALL)
def test_no_rounding_is_contracted_away(name, capability):
    ptx = compiled(NormSpec.parse(ALL[name]), 128, ("cuda", capability, 32)).asm["ptx"]
    assert contractions(ptx) == []


AMD = TARGETS[3:]


def amd_instructions(name, target, **options):
    text = compiled(NormSpec.parse(ALL[name]), 128, target, **options).asm["amdgcn"]
    return Counter(re.findall(r"^\s+([vsdb]\w*_\w+)", text, re.MULTILINE))


def contracted_on_amd(name, target):
    """What changes if the compiler may not contract: nothing, where nothing is contracted."""
    strict = amd_instructions(name, target, enable_fp_fusion=False)
    return amd_instructions(name, target) - strict


@pytest.mark.parametrize("target", AMD, ids=lambda target: target[1])
def test_no_rounding_is_contracted_away_on_amd(target):
    assert {name: found for name in ALL if (found := contracted_on_amd(name, target))} == {}


@pytest.fixture
def unguarded(monkeypatch):
    """Products that a compiler may contract."""
    monkeypatch.setattr(triton_words, "_PRODUCTS", ())
    triton_row._kernel.cache_clear()
    yield
    triton_row._kernel.cache_clear()


@pytest.mark.usefixtures("unguarded")
def test_contraction_is_noticed():
    assert contractions(compiled(NormSpec.parse(SPECS["bias"]), 128).asm["ptx"])
    assert contracted_on_amd("bias", AMD[0])


# ---- Calls ---------------------------------------------------------------------------------------


class Launches:
    """Stands for a kernel, for what its launch returns, and for both of them with a grid."""

    def __init__(self):
        self.found = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.found.append((grid, arguments, options))
            return self

        return launch


def test_what_a_launch_is_given():
    spec, made = NormSpec.parse(LLAMA), Launches()
    call = triton_call.RowCall(spec, lambda hidden, rows: triton_call.Compiled(made, 2, 4))
    x, weight = torch.zeros(2, 6, 128).bfloat16()[:, ::2], torch.zeros(128).bfloat16()
    out = call(x, None, weight, None, 1e-6)
    ((grid, arguments, options),) = made.found
    assert (grid, options) == ((3, 1, 1), {"num_warps": 4})
    assert arguments[0] is x
    assert arguments[1] is weight
    assert arguments[2] is out
    assert arguments[3:8] == (6, 1, 256, 0, 1)
    assert arguments[8] == steps.single(1e-6)
    assert out.is_contiguous()
    call(x, None, weight, None, 1)
    assert made.found[1][1][8] == 1.0
    assert isinstance(made.found[1][1][8], float)  # an int would be another argument type
    call(torch.zeros(0, 128).bfloat16(), None, weight, None, 1e-6)
    assert len(made.found) == 2


@pytest.mark.parametrize(
    ("x", "eps"),
    [
        (torch.zeros(769).bfloat16()[1:].view(2, 3, 128), 1e-6),
        (torch.zeros(2, 6, 128).bfloat16()[:, ::2], 1e-6),
        (torch.zeros(5, 128).bfloat16(), 1e-6),
        (torch.zeros(2, 3, 128).bfloat16(), 1e-5),
    ],
    ids=["alignment", "strides", "shape", "eps"],
)
def test_other_tensors_have_a_plan_of_their_own(x, eps):
    made = Launches()
    call = triton_call.RowCall(
        NormSpec.parse(LLAMA), lambda hidden, rows: triton_call.Compiled(made, 2, 4)
    )
    weight = torch.zeros(128).bfloat16()
    for _ in range(2):
        call(torch.zeros(2, 3, 128).bfloat16(), None, weight, None, 1e-6)
        call(x, None, weight, None, eps)
    assert len(call._plans) == 2


# ---- The kernel record ---------------------------------------------------------------------------


def test_source_can_be_read_back():
    spec = NormSpec.parse(LLAMA)
    found = triton_row.inline(spec, 128, None)
    text = triton_source.source(spec, 128, found.rows_per_program, cut=False)
    assert inspect.getsource(found.kernel.fn) == text
    assert tuple(found.kernel.arg_names) == found.parameters


def test_prepare_says_why_not(monkeypatch):
    spec = NormSpec.parse(LLAMA)
    assert triton_row.KERNEL.prepare(spec, 128) is None
    assert triton_row.KERNEL.prepare(spec, None) == "hidden is known only at run time"
    assert triton_row.KERNEL.prepare(spec, 65_537) == "hidden 65537 > 65536"
    text = LLAMA.replace("mean:f32,", "")
    assert "only mean or sum" in triton_row.KERNEL.prepare(NormSpec.parse(text), 128)
    monkeypatch.setattr(triton_row.importlib.util, "find_spec", lambda name: None)
    assert triton_row.KERNEL.prepare(spec, 128) == "triton is not installed"
    assert triton_row.KERNEL.unavailable() == "triton is not installed"


def test_bits_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0, printed


def test_wrong_tensors_are_refused_also_where_a_plan_is_kept():
    """As cuda.row does: a kept plan must not read past a shorter residual."""
    spec = NormSpec.parse(SPECS["residual"])
    made = Launches()
    call = triton_call.RowCall(spec, lambda hidden, rows: triton_call.Compiled(made, 2, 4))
    given = inputs(spec, 4, 128)
    call(given.x, given.residual, given.weight, None, 1e-6)
    for kind, text, tensors in (
        (ValueError, r"residual's shape \(3, 128\)", (given.x, given.residual[:3], given.weight)),
        (TypeError, "residual is torch.float32", (given.x, given.residual.float(), given.weight)),
        (TypeError, "weight is missing", (given.x, given.residual, None)),
        (TypeError, "weight is torch.float32", (given.x, given.residual, given.weight.float())),
        (ValueError, "weight has 100 elements", (given.x, given.residual, given.weight[:100])),
    ):
        with pytest.raises(kind, match=text):
            call(*tensors, None, 1e-6)
    assert len(made.found) == 1
