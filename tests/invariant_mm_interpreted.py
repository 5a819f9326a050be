"""The product kernels' meaning, in Triton's interpreter: small integers, so every sum is exact.

test_invariant_mm_triton.py runs this file in a process of its own, because TRITON_INTERPRET=1 must
be set before Triton is imported. What order sums are added in is the hardware's part, and tested
there; here a chunk that is lost, read twice or cut at the wrong place shows.
"""

import math

import numpy as np
import pytest
import torch
from triton_cases import interpreted

from fxpass.kernels.invariant import mm_gpu, mm_plan
from fxpass.kernels.invariant.mm_schedule import Schedule

WALK = Schedule("walk", 16, 32, 64, 4, 2)
SPLIT = Schedule("split", 32, 16, 64, 4, 2)
TMA = Schedule("tma", 64, 64, 64, 4, 2)
EVERY = (
    WALK,
    Schedule("walk", 64, 128, 128, 4, 2, group=2),
    SPLIT,
    TMA,
    Schedule("tma", 32, 64, 128, 4, 2, group=1, programs=2),
)
each_schedule = pytest.mark.parametrize("schedule", EVERY, ids=lambda s: f"{s.kind}{s.block_m}")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    from triton.runtime import interpreter

    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        yield


def _dot(builder, a, b, total, *_):
    """In float32; the interpreter's own multiplies the bit patterns of bfloat16."""
    del builder
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(_wide(a) @ _wide(b) + total.data, total.dtype.scalar)


def _wide(handle):
    if handle.dtype.scalar.name != "bf16":
        return handle.data.astype(np.float32)
    return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def use(monkeypatch):
    """Take this schedule for every product, with chunks of this length."""

    def force(schedule, chunk=256):
        monkeypatch.setattr(mm_plan, "pick", lambda device, problem: schedule)
        monkeypatch.setattr(mm_plan, "mm_chunk", lambda *_, **__: chunk)
        mm_gpu._plans.clear()

    yield force
    mm_gpu._plans.clear()


def ints(*shape, dtype=torch.float16):
    return torch.randint(-2, 3, shape).to(dtype)


def exact(a, b, bias=None, alpha=1.0, beta=1.0):
    found = alpha * (a.double() @ b.double())
    return found if bias is None else found + beta * bias.double()


def assert_product(a, b, bias=None, **named):
    found = mm_gpu.matmul(a, b, bias, **named)
    out_dtype = named.pop("out_dtype", None) or a.dtype
    named.pop("tf32", None)
    wanted = exact(a, b, bias, **named).to(out_dtype)
    assert found.dtype == wanted.dtype
    assert found.is_contiguous()
    assert torch.equal(found, wanted)


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(schedule, dtype, use):
    use(schedule)
    for m, n, k in ((1, 8, 8), (3, 72, 520), (70, 48, 256)):
        assert_product(ints(m, k, dtype=dtype), ints(n, k, dtype=dtype).t())


@pytest.mark.parametrize("schedule", [WALK, SPLIT], ids=lambda s: s.kind)
def test_odd_sizes(schedule, use):
    use(schedule)
    for m, n, k in ((1, 1, 1), (5, 33, 511), (17, 31, 257), (2, 7, 1000)):
        assert_product(ints(m, k), ints(n, k).t())


@each_schedule
def test_number_of_chunks(schedule, use):
    a, b = ints(20, 1024), ints(40, 1024).t()
    for chunk in (128, 384, 1024, 4096):
        use(schedule, chunk)
        assert_product(a, b)


@each_schedule
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_epilogue(schedule, out_dtype, use):
    use(schedule)
    a, b = ints(5, 264), ints(264, 40)
    for bias in (ints(40), ints(5, 1, dtype=torch.float32), ints(40, 5).t(), ints(1).squeeze()):
        assert_product(a, b, bias, out_dtype=out_dtype)
        assert_product(a, b, bias, alpha=-2.0, beta=0.5, out_dtype=out_dtype)
    assert_product(a, b, alpha=3.0, out_dtype=out_dtype)


@each_schedule
def test_bias_that_beta_ignores(schedule, use):
    use(schedule)
    a, b = ints(5, 264), ints(264, 40)
    found = mm_gpu.matmul(a, b, torch.full((40,), math.nan), beta=0.0)
    assert torch.equal(found, exact(a, b).half())


@each_schedule
def test_strides(schedule, use):
    use(schedule)
    a, b = ints(8, 264), ints(264, 40)
    for x in (a, a.t().contiguous().t(), ints(8, 528)[:, :264]):
        for y in (b, b.t().contiguous().t(), ints(264, 80)[:, 8:48]):
            assert_product(x, y)


def test_strides_no_descriptor_takes(use):
    use(WALK)
    for x in (ints(6, 520)[:, ::2], ints(1, 260).expand(6, 260), ints(1561)[1:].view(6, 260)):
        for y in (ints(520, 40)[::2], ints(260, 1).expand(260, 40), ints(40, 261)[:, :260].t()):
            assert_product(x, y)


@pytest.mark.parametrize("schedule", [WALK, SPLIT], ids=lambda s: s.kind)
def test_batches(schedule, use):
    use(schedule)
    a, b = ints(3, 5, 300), ints(3, 300, 9)
    assert_product(a, b)
    assert_product(a, b, ints(3, 5, 9))
    assert_product(a, b, ints(3, 1, 9), alpha=2.0, beta=4.0)
    assert_product(a.transpose(0, 1).contiguous().transpose(0, 1), b.mT.contiguous().mT)
    assert_product(a[:1].expand(3, 5, 300), b)


def test_offsets_of_64_bits(use, monkeypatch):
    """The same meaning where offsets are wide; that they have to be shows only on a GPU."""
    monkeypatch.setattr(mm_plan, "_FAR", 1)
    for schedule in (WALK, SPLIT):
        use(schedule)
        assert_product(ints(5, 300), ints(300, 33), ints(5, 33))


def test_nothing_to_add(use):
    use(WALK)
    for a, b in (
        (ints(0, 8), ints(8, 4)),
        (ints(3, 0), ints(0, 4)),
        (ints(3, 8), ints(8, 0)),
        (ints(0, 3, 8), ints(0, 8, 4)),
    ):
        assert_product(a, b)
        assert_product(a, b, ints(1), beta=3.0, out_dtype=torch.float32)


@each_schedule
def test_other_rows_do_not_matter(schedule, use):
    use(schedule)
    a, b = ints(40, 264), ints(264, 40)
    wanted = mm_gpu.matmul(a, b)
    a[:7], a[8:] = math.nan, math.inf
    assert torch.equal(mm_gpu.matmul(a, b)[7], wanted[7])


def test_kept_plans_are_for_operands_like_theirs(use):
    use(WALK)
    a, b, bias = ints(4, 264), ints(264, 40), ints(40)
    for _ in range(2):
        assert_product(a, b)
        assert_product(a, b, bias)
        assert_product(a, b, bias.float())
        assert_product(a, b, bias, out_dtype=torch.float32)
        assert_product(a[:3], b, bias)
        assert_product(a.t().contiguous().t(), b, bias, alpha=2.0)
        assert_product(a.bfloat16(), b.bfloat16())
        assert_product(a.float(), b.float())
        assert_product(a.float(), b.float(), tf32=True)
