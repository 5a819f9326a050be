"""Batch-invariant products on an NVIDIA GPU: one result, whatever computes it and whatever is near.

Every comparison is of bits, but for the one with float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from fxpass.kernels.invariant import mm_gpu, mm_plan
from fxpass.kernels.invariant.mm_schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {
    "bf16": (torch.bfloat16, False),
    "f16": (torch.float16, False),
    "f32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ERROR = {"bf16": 2e-9, "f16": 2e-9, "f32": 1e-9, "tf32": 2e-3}
"""Largest norm of the error, relative, for results in float32: times K but for tf32, because what
a tensor core adds to its sum is cut off, not rounded."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    mm_gpu._plans.clear()
    yield
    mm_gpu._plans.clear()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bits, NaN included."""
    integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(integers), y.view(integers))


# ---- Schedules -----------------------------------------------------------------------------------

WALKS = [
    Schedule("walk", 16, 32, 128, 4, 2),
    Schedule("walk", 16, 16, 64, 2, 3),
    Schedule("walk", 64, 64, 32, 4, 3),
    Schedule("walk", 128, 128, 32, 8, 3),
]
SPLITS = [Schedule("split", 16, 64, 64, 4, 2), Schedule("split", 64, 128, 64, 4, 3)]
TMAS = [
    Schedule("tma", 64, 32, 128, 4, 3),
    Schedule("tma", 128, 128, 64, 8, 4, programs=2),
    Schedule("tma", 128, 256, 64, 8, 2, group=2),
]
EXACT = [
    Schedule("walk", 16, 32, 32, 4, 3),
    Schedule("walk", 64, 64, 32, 8, 2),
    Schedule("walk", 32, 32, 16, 4, 2),
    Schedule("split", 64, 64, 32, 8, 2),
]


def schedules(kind: str) -> list[Schedule]:
    if kind == "f32":
        return EXACT
    found = [*WALKS, *SPLITS]
    hopper = torch.cuda.get_device_capability()[0] == 9
    return found + TMAS if hopper and kind != "tf32" else found


@each_kind
def test_every_schedule_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, tf32 = KINDS[kind]
    a, b = randn(200, 2000, dtype=dtype), randn(776, 2000, dtype=dtype).t()
    for chunk in (640, 2048):
        monkeypatch.setattr(mm_plan, "mm_chunk", lambda *_, length=chunk, **__: length)
        wanted = None
        for schedule in schedules(kind):
            if chunk == 2048 and schedule.kind == "split":
                continue
            monkeypatch.setattr(mm_plan, "pick", lambda *_, found=schedule: found)
            mm_gpu._plans.clear()
            found = mm_gpu.matmul(a, b, out_dtype=torch.float32, tf32=tf32)
            wanted = found if wanted is None else wanted
            assert same(found, wanted), (schedule, chunk)
            row = mm_gpu.matmul(a[7:8], b, out_dtype=torch.float32, tf32=tf32)
            assert same(row, wanted[7:8]), (schedule, chunk)


# ---- Rows ----------------------------------------------------------------------------------------

SHAPES = ((4096, 4096), (4096, 6144), (2048, 512), (1001, 776))
COUNTS = (1, 2, 3, 7, 16, 17, 33, 64, 65, 129, 255, 257, 513, 1024)


@each_kind
def test_rows_do_not_depend_on_their_number_or_place(kind: str) -> None:
    dtype, tf32 = KINDS[kind]
    for k, n in SHAPES if kind in ("bf16", "f32") else SHAPES[2:]:
        a, b = randn(2048, k, dtype=dtype), randn(n, k, dtype=dtype).t()
        wanted = mm_gpu.matmul(a, b, tf32=tf32)
        for m in COUNTS:
            assert same(mm_gpu.matmul(a[:m], b, tf32=tf32), wanted[:m]), (k, n, m)
        order = torch.randperm(300, device="cuda")
        assert same(mm_gpu.matmul(a[order], b, tf32=tf32), wanted[order]), (k, n)


@each_kind
def test_neighbours_do_not_matter(kind: str) -> None:
    dtype, tf32 = KINDS[kind]
    a, b = randn(300, 1001, dtype=dtype), randn(1001, 776, dtype=dtype)
    wanted = mm_gpu.matmul(a, b, tf32=tf32)
    for bad in (math.nan, math.inf):
        a[:77], a[78:] = bad, bad
        for m in (78, 128, 300):
            assert same(mm_gpu.matmul(a[:m], b, tf32=tf32)[77], wanted[77]), (bad, m)


@each_kind
def test_float64(kind: str) -> None:
    dtype, tf32 = KINDS[kind]
    for k, n in SHAPES[1:]:
        for m in (5, 700):
            a, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype).t()
            found = mm_gpu.matmul(a, b, out_dtype=torch.float32, tf32=tf32)
            wanted = a.double() @ b.double()
            error = float((found.double() - wanted).norm() / wanted.norm())
            assert error <= ERROR[kind] * (1 if kind == "tf32" else max(k, 1000)), (m, k, n, error)
            if kind == "tf32":
                assert error > 1e-5  # it was asked for


# ---- Layout --------------------------------------------------------------------------------------


def layouts(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same matrix in memory of other shapes."""
    rows, cols = matrix.shape
    made = {
        "rows": matrix.new_empty(rows, cols),
        "columns": matrix.new_empty(cols, rows).t(),
        "unaligned": matrix.new_empty(rows * cols + 1)[1:].view(rows, cols),
        "wide": matrix.new_empty(rows, cols + 3)[:, 1:-2],
        "apart": matrix.new_empty(rows, 2 * cols)[:, ::2],
    }
    return {name: view.copy_(matrix) for name, view in made.items()}


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_layout_changes_no_bit(kind: str) -> None:
    dtype, _ = KINDS[kind]
    for m, k, n in ((5, 1024, 768), (200, 1000, 512)):
        a, b = layouts(randn(m, k, dtype=dtype)), layouts(randn(k, n, dtype=dtype))
        wanted = mm_gpu.matmul(a["rows"], b["rows"])
        for name in a:
            assert same(mm_gpu.matmul(a[name], b["columns"]), wanted), (m, name)
            assert same(mm_gpu.matmul(a["rows"], b[name]), wanted), (m, name)


def test_expanded_operands() -> None:
    a, b = randn(1, 512), randn(512, 1)
    wanted = mm_gpu.matmul(a.repeat(70, 1), b.repeat(1, 40))
    assert same(mm_gpu.matmul(a.expand(70, 512), b.expand(512, 40)), wanted)


def test_offsets_beyond_31_bits() -> None:
    k, n = 14_336, 151_936
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    weight[-64:] = randn(64, k)
    a = randn(40, k)
    wanted = a.double() @ weight[-64:].double().t()
    for m in (1, 40):
        found = mm_gpu.matmul(a[:m], weight.t(), out_dtype=torch.float32)
        assert not found[:, :-64].any()
        assert (found[:, -64:] - wanted[:m]).norm() <= 2e-9 * k * wanted[:m].norm()


# ---- Epilogue ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1024, 512), (512, 2048)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_bias(shape: tuple[int, int], out_dtype: torch.dtype) -> None:
    """One rounding, after the bias: the same from the kernels of one row and of many."""
    k, n = shape
    a, b = randn(600, k), randn(n, k).t()
    sums = mm_gpu.matmul(a, b, out_dtype=torch.float32)
    for bias in (randn(n), randn(n, dtype=torch.float32), randn(600, n), randn(600, 1)):
        wanted = (sums + 0.5 * bias.float()).to(out_dtype)
        for m in (1, 16, 40, 600):
            part = bias if bias.dim() == 1 else bias[:m]
            found = mm_gpu.matmul(a[:m], b, part, beta=0.5, out_dtype=out_dtype)
            assert same(found, wanted[:m]), (tuple(bias.shape), m)
    scaled = mm_gpu.matmul(a, b, randn(n), alpha=0.3, beta=0.7)
    assert same(mm_gpu.matmul(a, b, alpha=2.0), (2 * sums).bfloat16())
    assert not torch.equal(scaled, sums.bfloat16())


def test_alpha_and_beta_of_one_row_and_many() -> None:
    a, b, bias = randn(600, 1024), randn(2048, 1024).t(), randn(2048)
    wanted = mm_gpu.matmul(a, b, bias, alpha=0.3, beta=0.7)
    for m in (1, 30, 100, 300):
        assert same(mm_gpu.matmul(a[:m], b, bias, alpha=0.3, beta=0.7), wanted[:m])


# ---- Batches of matrices -------------------------------------------------------------------------


def test_batches() -> None:
    a, b = randn(3, 130, 700), randn(3, 700, 72)
    wanted = mm_gpu.matmul(a, b, out_dtype=torch.float32)
    exact = a.double() @ b.double()
    assert (wanted - exact).norm() <= 2e-6 * exact.norm()
    for entry, m in itertools.product(range(3), (1, 5, 64, 130)):
        one = slice(entry, entry + 1)
        found = mm_gpu.matmul(a[one, :m], b[one], out_dtype=torch.float32)
        assert same(found, wanted[one, :m])
    turned = mm_gpu.matmul(a.mT.contiguous().mT, b.mT.contiguous().mT, out_dtype=torch.float32)
    assert same(turned, wanted)


def test_zeros_at_the_end_of_k_change_no_bit_of_a_batch() -> None:
    """Attention over a growing cache: masked weights are zeros."""
    a, b = randn(2, 20, 3000), randn(2, 3000, 64)
    for k in (1, 100, 1023, 1024, 1025, 2100):
        cut = mm_gpu.matmul(a[..., :k], b[:, :k])
        a_zero = torch.where(torch.arange(3000, device="cuda") < k, a, 0)
        assert same(mm_gpu.matmul(a_zero, b), cut), k


# ---- Calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 64, 600])
@pytest.mark.parametrize("n", [512, 4096])
def test_cuda_graph(m: int, n: int) -> None:
    a, b = randn(m, 4096), randn(n, 4096).t()
    wanted = mm_gpu.matmul(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mm_gpu.matmul(a, b)
    out.zero_()
    graph.replay()
    assert same(out, wanted)
    a.copy_(a.flip(1))
    wanted = mm_gpu.matmul(a, b)
    graph.replay()
    assert same(out, wanted)


def test_kept_plans_look_at_alignment() -> None:
    """Equal shapes and strides, other addresses, in every order."""
    memory = randn(64 * 512 + 8)
    views: list[Callable[[], torch.Tensor]] = [
        lambda: memory[: 64 * 512].view(64, 512),
        lambda: memory[1 : 64 * 512 + 1].view(64, 512),
        lambda: memory[8:].view(64, 512),
    ]
    b = randn(512, 4096)
    for view in (*views, *reversed(views)):
        a = view()
        assert same(mm_gpu.matmul(a, b), mm_gpu.matmul(a.clone(), b))
