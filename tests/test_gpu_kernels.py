"""The row kernels on an NVIDIA GPU: exact bits, the same in every batch, on every layout.

What a kernel means is tested against the reference on the device; which bits it gives against
`triton_cases.expected`, which does the arithmetic on the CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import EPS, ROW_STEPS_16BIT, SPECS, Inputs, inputs, same_bits
from test_kernels import assert_matches_reference
from triton_cases import MORE_SPECS, expected

from fxpass.kernels import by_name, reference
from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec, is_narrow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA, TRITON = by_name("cuda.row"), by_name("triton.row")
each_kernel = pytest.mark.parametrize("kernel", [CUDA, TRITON], ids=lambda kernel: kernel.name)

# NVRTC builds a kernel in 0.2 s, on all cores at once. Triton takes longer and builds one again for
# a count of 1, for multiples of 16 and for other alignments.
MATRIX = {
    "cuda.row": list(
        itertools.product((1, 2, 17, 31, 128, 257, 1000, 2880, 4096, 8200, 20_000), (1, 33))
    ),
    "triton.row": [(128, 33), (1000, 33), (20_000, 33)],
}
"""(hidden, rows)"""
ALL = {name: NormSpec.parse(text) for name, text in {**SPECS, **MORE_SPECS}.items()}
each_spec = pytest.mark.parametrize("name", ALL)
PLAIN = (
    "x={0} row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:{0},mul_weight:{0}"
    " weight={0}"
)
RESIDUAL = PLAIN.replace("x={0}", "x={0} residual={0} sum={0}") + " outputs=out,sum,row"


def on_device(given: Inputs) -> Inputs:
    names = ("x", "residual", "weight", "bias")
    tensors = {name: getattr(given, name) for name in names}
    moved = {name: t if t is None else t.cuda() for name, t in tensors.items()}
    return dataclasses.replace(given, **moved)


def build(pairs: list[tuple[NormSpec, int]]) -> None:
    """Build `cuda.row` for many specs and sizes side by side."""
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(lambda pair: CUDA.prepare(*pair), pairs))
    assert reasons == [None] * len(pairs)


@pytest.fixture(scope="module")
def matrix_built() -> None:
    hiddens = {hidden for hidden, _ in MATRIX["cuda.row"]}
    build(list(itertools.product(ALL.values(), hiddens)))


# ---- Meaning and bits ---------------------------------------------------------------------------


@pytest.mark.usefixtures("matrix_built")
@each_kernel
@each_spec
def test_matches_reference(kernel: Kernel, name: str) -> None:
    spec = ALL[name]
    elements = different = 0
    for hidden, rows in MATRIX[kernel.name]:
        given = on_device(inputs(spec, rows, hidden, seed=hidden))
        if given.bias is not None:
            given.bias.zero_()  # a sum near zero has no relative error bound
        counts = assert_matches_reference(kernel, spec, given)
        elements, different = elements + counts["elements"], different + counts["different"]
    # As in test_kernels: at most so many values lie within a float32 difference of a tie.
    if is_narrow(spec.out) and name not in {*ROW_STEPS_16BIT, "rsqrt_16bit"}:
        assert different <= 1e-3 * elements


def device_rsqrt(value: torch.Tensor) -> torch.Tensor:
    """MUFU.RSQ: an approximation, and the one operation no CPU has the bits of."""
    return torch.rsqrt(value.cuda()).cpu()


@pytest.mark.usefixtures("matrix_built")
@each_kernel
@each_spec
def test_exact_bits(kernel: Kernel, name: str) -> None:
    spec = ALL[name]
    for hidden, rows in MATRIX[kernel.name]:
        given = inputs(spec, rows, hidden, seed=hidden + rows)
        found = on_device(given).run(kernel, spec)
        wanted = expected(spec, given, rsqrt=device_rsqrt)
        for output in spec.outputs:
            assert same_bits(found[output].cpu(), wanted[output]), (output, rows, hidden)


@pytest.mark.usefixtures("matrix_built")
@each_spec
def test_both_kernels_give_the_same_bits(name: str) -> None:
    spec = ALL[name]
    per_head = [(128, 9, 3)] if spec.weight is not None else []
    for hidden, rows, weight_rows in [(*point, 1) for point in MATRIX["triton.row"]] + per_head:
        given = on_device(inputs(spec, rows, hidden, weight_rows=weight_rows, seed=hidden))
        found, wanted = given.run(CUDA, spec), given.run(TRITON, spec)
        for output in spec.outputs:
            assert same_bits(found[output], wanted[output]), (output, rows, hidden)


# ---- Any batch, any place -----------------------------------------------------------------------

ROWS = (1, 2, 3, 7, 8, 31, 64, 255, 256, 257, 4096, 32_768)
HIDDEN = (
    1, 31, 64, 128, 257, 512, 1000, 2048, 2880, 4096, 5120, 7168, 8192, 16_384, 65_536,
)  # fmt: skip
FOR_TRITON = {"bf16": (1, 31, 128, 257, 1000, 2880, 4096, 5120, 16_384, 65_536), "f32": (128, 5120)}
MOST = 1 << 28
"""Elements of one tensor."""
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SWEEP = [
    pytest.param(kernel, text, dtype, hidden, id=f"{kernel.name}-{kind}-{dtype}-{hidden}")
    for kernel, (kind, text), dtype, hidden in itertools.product(
        (CUDA, TRITON), {"plain": PLAIN, "residual": RESIDUAL}.items(), DTYPES, HIDDEN
    )
    if kernel is CUDA or (kind == "residual" and hidden in FOR_TRITON.get(dtype, ()))
]


@pytest.fixture(scope="module")
def pools() -> dict[str, list[torch.Tensor]]:
    """Numbers for x and residual, of every dtype, that the whole sweep takes its rows from."""
    torch.manual_seed(0)
    made = {
        name: torch.empty(2, MOST, dtype=dtype, device="cuda") for name, dtype in DTYPES.items()
    }
    return {name: list(tensor.normal_()) for name, tensor in made.items()}


@pytest.fixture(scope="module")
def sweep_built() -> None:
    specs = [NormSpec.parse(t.format(d)) for t, d in itertools.product((PLAIN, RESIDUAL), DTYPES)]
    build(list(itertools.product(specs, HIDDEN)))


def equal(found: tuple[torch.Tensor, ...], wanted: list[torch.Tensor]) -> bool:
    """Bits of outputs without NaNs; gigabytes of them."""
    integers = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.view(integers[a.itemsize]), b.contiguous().view(integers[b.itemsize]))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.usefixtures("sweep_built")
@pytest.mark.parametrize(("kernel", "text", "dtype", "hidden"), SWEEP)
def test_a_row_has_the_same_bits_in_every_batch(
    kernel: Kernel, text: str, dtype: str, hidden: int, pools: dict[str, list[torch.Tensor]]
) -> None:
    spec = NormSpec.parse(text.format(dtype))
    most = min(ROWS[-1], MOST // hidden)
    full = [pool[: most * hidden].view(most, hidden) for pool in pools[dtype]]
    weight = pools[dtype][1][-hidden:].clone()
    call = kernel.entry(spec)

    def run(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = call(x, residual if spec.residual else None, weight, None, EPS)
        return made if isinstance(made, tuple) else (made,)

    whole = run(*full)
    generator = torch.Generator().manual_seed(hidden)
    for rows in (n for n in ROWS if n < most):
        start = int(torch.randint(1, most - rows + 1, (1,), generator=generator))
        for first in (0, start):  # for odd hidden the second is also aligned differently
            some = slice(first, first + rows)
            found = run(full[0][some], full[1][some])
            assert equal(found, [tensor[some] for tensor in whole]), (rows, first)


def one_element_on(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.numel() + 1)[1:].view_as(t).copy_(t)


def gaps_between_rows(elements: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 2 * elements), math.nan)
        return wide[..., elements : t.shape[-1] + elements].copy_(t)

    return change


def moved(*order: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Dims swapped in memory; each `order` is its own inverse."""
    return lambda t: t.permute(order).contiguous().permute(order)


VIEWS = {
    "as it is": lambda t: t,
    "one element on": one_element_on,
    "odd row stride": gaps_between_rows(3),
    "even row stride": gaps_between_rows(16),
    "two strides": moved(1, 0, 2, 3),
    "three strides": moved(2, 1, 0, 3),
    "last stride not 1": moved(3, 1, 2, 0),
}
LAYOUTS = [
    (x, residual)
    for x, residual in itertools.product(VIEWS, VIEWS)
    if x == residual or "as it is" in (x, residual)
]


@pytest.mark.usefixtures("sweep_built")
@pytest.mark.parametrize(
    ("kernel", "dtype", "hidden"),
    [
        pytest.param(kernel, dtype, hidden, id=f"{kernel.name}-{dtype}-{hidden}")
        for kernel, dtype, hidden in itertools.product((CUDA, TRITON), DTYPES, (1, 31, 128, 16_384))
        if kernel is CUDA or (dtype == "bf16" and hidden in (31, 128))
    ],
)
def test_layout_changes_no_bit(kernel: Kernel, dtype: str, hidden: int) -> None:
    spec = NormSpec.parse(RESIDUAL.format(dtype))
    given = on_device(inputs(spec, 6, 5, 2, hidden))
    whole = given.run(kernel, spec)
    for layout in LAYOUTS:
        x, residual = (
            VIEWS[name](t) for name, t in zip(layout, (given.x, given.residual), strict=True)
        )
        assert torch.equal(x, given.x)
        found = dataclasses.replace(given, x=x, residual=residual).run(kernel, spec)
        for output in spec.outputs:
            assert found[output].is_contiguous()
            assert same_bits(found[output], whole[output]), (layout, output)
    weight = one_element_on(given.weight)  # alone among aligned tensors
    found = dataclasses.replace(given, weight=weight).run(kernel, spec)
    assert all(same_bits(found[output], whole[output]) for output in spec.outputs)


@each_kernel
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_heads_of_a_packed_projection(kernel: Kernel, tokens: int) -> None:
    spec = NormSpec.parse(PLAIN.format("bf16"))
    packed = torch.randn(tokens, 6144, device="cuda").bfloat16()
    weight = torch.randn(8, 128, device="cuda").bfloat16()
    heads = packed.view(tokens, 48, 128)[:, 32:40]
    assert heads.stride() == (6144, 128, 1)
    found = Inputs(heads, None, weight, None).run(kernel, spec)["out"]
    for head in range(8):
        alone = Inputs(heads[:, head].contiguous(), None, weight[head], None)
        assert same_bits(found[:, head].contiguous(), alone.run(kernel, spec)["out"])


# ---- Values at the edge -------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("name", ["llama", "llama_f32", "residual", "l2", "x_over_sqrt"])
def test_rows_of_nan_infinity_and_zero(kernel: Kernel, name: str) -> None:
    spec = ALL[name]
    for eps, hidden in itertools.product((0.0, EPS), (1, 1000)):
        given = inputs(spec, 6, hidden)
        given.x[1] = 0.0
        if given.residual is not None:
            given.residual[1] = 0.0
        for row, bad in ((2, math.nan), (3, math.inf), (4, -math.inf)):
            given.x[row, hidden // 2] = bad
        given = on_device(dataclasses.replace(given, eps=eps))
        found, wanted = given.run(kernel, spec), given.run(reference.KERNEL, spec)
        for output in spec.outputs:
            assert torch.equal(found[output].isnan(), wanted[output].isnan())
            assert torch.equal(found[output].isinf(), wanted[output].isinf())
        clean = given.map_rows(lambda t: t[[0, 1, 5]]).run(kernel, spec)
        for output in spec.outputs:  # a row does not see its neighbours' NaNs
            assert same_bits(found[output][[0, 1, 5]], clean[output])


@each_kernel
@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 128), (0, 1)])
def test_no_rows(kernel: Kernel, shape: tuple[int, ...]) -> None:
    spec = NormSpec.parse(RESIDUAL.format("bf16"))
    found = on_device(inputs(spec, *shape)).run(kernel, spec)
    assert [tuple(t.shape) for t in found.values()] == [shape, shape, (*shape[:-1], 1)]


# ---- Streams, threads and graphs ----------------------------------------------------------------


def made(kernel: Kernel, dtype: str = "bf16", hidden: int = 4096) -> Callable[..., torch.Tensor]:
    """(x, weight) -> the normalised x, built and launched once."""
    spec = NormSpec.parse(PLAIN.format(dtype))
    call = kernel.entry(spec)
    x = torch.ones(1, hidden, device="cuda", dtype=DTYPES[dtype])
    call(x, None, x[0], None, EPS)
    torch.cuda.synchronize()
    return lambda x, weight: call(x, None, weight, None, EPS)


@each_kernel
def test_runs_on_the_current_stream(kernel: Kernel) -> None:
    norm = made(kernel)
    new, weight = (
        torch.randn(64, 4096, device="cuda").bfloat16(),
        torch.ones(4096).bfloat16().cuda(),
    )
    wanted, x = norm(new, weight), torch.zeros_like(new)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # 50 ms: another stream would read zeros
        x.copy_(new)
        found = norm(x, weight)
    stream.synchronize()
    assert torch.equal(found, wanted)


@each_kernel
@pytest.mark.parametrize("rows", [1, 40, 3000])
def test_a_launch_waits_for_what_it_reads(kernel: Kernel, rows: int) -> None:
    """Each kernel of a chain reads what the one before wrote, and overwrites what others read."""
    norm = made(kernel)
    weight = (torch.rand(4096, device="cuda") + 0.5).bfloat16()
    start = torch.randn(rows, 4096, device="cuda").bfloat16()

    def chain(wait: Callable[[], None]) -> list[torch.Tensor]:
        x, kept = start.clone(), []
        for step in range(100):
            y = norm(x, weight)
            wait()
            if step % 10 == 0:
                x.copy_(y.roll(1, -1))
                kept.append(y)
            else:
                x = y
            wait()
        return kept

    found, wanted = chain(lambda: None), chain(torch.cuda.synchronize)
    assert all(map(torch.equal, found, wanted))


@each_kernel
def test_a_thread_that_has_done_nothing_on_the_gpu(kernel: Kernel) -> None:
    norm = made(kernel)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    wanted = norm(x, x[0])
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(norm(x, x[0])))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


@each_kernel
def test_many_threads(kernel: Kernel) -> None:
    norm = made(kernel)
    weight = torch.randn(4096, device="cuda").bfloat16()
    shared = [torch.randn(rows, 4096, device="cuda").bfloat16() for rows in (1, 2, 300, 1100)]
    wanted = [norm(x, weight) for x in shared]
    wrong: list[str] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for step in range(200):
                which = (number + step) % len(shared)
                # The same plan from all threads, each with memory and a stream of its own.
                found = norm(shared[which].clone(), weight)
                if not torch.equal(found, wanted[which]):
                    wrong.append(f"thread {number}, step {step}")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@each_kernel
@pytest.mark.parametrize("rows", [1, 3000])
def test_cuda_graph_replays_with_new_data(kernel: Kernel, rows: int) -> None:
    norm = made(kernel)
    weight = torch.randn(4096, device="cuda").bfloat16()
    x = torch.zeros(rows, 4096, device="cuda").bfloat16()
    norm(norm(x, weight), weight)  # the kernel for these rows is loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norm(norm(x, weight), weight)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(rows, 4096, device="cuda"))
        graph.replay()
        assert torch.equal(found, norm(norm(x, weight), weight))


@pytest.mark.parametrize("rows", [1, 600, 40_000])
def test_the_first_launch_may_be_inside_a_capture(rows: int) -> None:
    """A kernel built while the model compiles, and launched by nobody before the graph is made."""
    hidden = 2064 + rows % 7 * 8  # of no other test, so nothing of it is loaded yet
    spec = NormSpec.parse(PLAIN.format("bf16"))
    x = torch.randn(rows, hidden, device="cuda").bfloat16()
    assert CUDA.prepare(spec, hidden) is None
    call, graph = CUDA.entry(spec), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = call(x, None, x[0], None, EPS)
    graph.replay()
    assert torch.equal(found, call(x, None, x[0], None, EPS))


# ---- What `cuda.row` does not take --------------------------------------------------------------


def test_wrong_tensors_are_one_line() -> None:
    spec = NormSpec.parse(RESIDUAL.format("bf16"))
    call = CUDA.entry(spec)
    given = on_device(inputs(spec, 4, 128))
    x, residual, weight = given.x, given.residual, given.weight
    assert residual is not None
    assert weight is not None
    wanted = call(x, residual, weight, None, EPS)

    def refused(kind: type[Exception], text: str, *arguments: torch.Tensor | None) -> None:
        with pytest.raises(kind, match=text) as error:
            call(*arguments, EPS)
        assert "\n" not in str(error.value)

    bf16 = r"needs torch.bfloat16 on cuda:0"
    refused(TypeError, "x is on cpu, needs a CUDA device", x.cpu(), residual, weight, None)
    # Shapes and strides that were planned before, so only the rest of the key tells them apart.
    refused(TypeError, f"x is torch.float32 on cuda:0, {bf16}", x.float(), residual, weight, None)
    refused(TypeError, f"x is torch.float16 on cuda:0, {bf16}", x.half(), residual, weight, None)
    refused(
        TypeError, f"residual is torch.bfloat16 on cpu, {bf16}", x, residual.cpu(), weight, None
    )
    refused(TypeError, "residual is torch.float32", x, residual.float(), weight, None)
    refused(TypeError, f"weight is torch.bfloat16 on cpu, {bf16}", x, residual, weight.cpu(), None)
    refused(TypeError, "weight is torch.float16", x, residual, weight.half(), None)
    refused(TypeError, "weight is missing", x, residual, None, None)
    refused(TypeError, "bias is given", x, residual, weight, weight)
    refused(ValueError, r"residual's shape \(3, 128\)", x, residual[:3], weight, None)
    refused(ValueError, "weight has 100 elements", x, residual, weight[:100], None)
    refused(ValueError, "weight has 0 elements", x, residual, weight[:0], None)
    assert all(map(same_bits, call(x, residual, weight, None, EPS), wanted))


def test_more_rows_than_one_launch_are_refused() -> None:
    spec = NormSpec.parse("x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:bf16")
    x = torch.empty(1, 1, device="cuda", dtype=torch.bfloat16).expand(2**31, 1)
    with pytest.raises(ValueError, match="x has 2147483648 rows, needs at most 2147483647"):
        CUDA.entry(spec)(x, None, None, None, EPS)


def test_eps_beyond_float32_is_infinite() -> None:
    spec = NormSpec.parse(PLAIN.format("f32"))
    given = on_device(dataclasses.replace(inputs(spec, 2, 128), eps=1e40))
    assert torch.equal(given.run(CUDA, spec)["out"].abs(), torch.zeros(2, 128, device="cuda"))
