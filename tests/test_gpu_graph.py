"""On an NVIDIA GPU: row kernels inside Inductor's graphs, CUDA graphs and AOTInductor packages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases_rounding import unit
from kernel_cases import LLAMA, ROW_STEPS_16BIT, SPECS, inputs
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import fxpass
from fxpass import lowering, ops
from fxpass.kernels import by_name
from fxpass.spec import NormSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
TRITON = {"providers": ("triton",), "strict": True}


@pytest.fixture(autouse=True)
def clean():
    torch.compiler.reset()
    fxpass.reset_report()
    torch.manual_seed(0)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def llama(x, w):
    return w * unit(x).to(w.dtype)


def block(x, residual, w, projection):
    total = x + residual
    return llama(total, w) @ projection, total


def _code(compiled, *arguments) -> tuple[object, str]:
    """The result, and the generated text without comments."""
    found, texts = run_and_get_code(compiled, *arguments)
    lines = "\n".join(texts).splitlines()
    return found, "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def _calls_us(code: str) -> bool:
    return "extern_kernels.fxpass" in code or "torch.ops.fxpass" in code


def _every(kernel: str, shape: tuple[int, int]):
    """(name, spec, compiled outputs, launched outputs of triton.row) of all specs, in one graph."""
    accepted = {
        name: spec
        for name, spec in ((name, NormSpec.parse(text)) for name, text in SPECS.items())
        if by_name(kernel).refusal(spec, "cuda", shape[-1]) is None
    }
    tensors = []
    for spec in accepted.values():
        given = inputs(spec, *shape)
        roles = (given.x, given.residual, given.weight, given.bias)
        tensors.append([None if tensor is None else tensor.cuda() for tensor in roles])
    calls = [(ops.op_for(spec.outputs), str(spec)) for spec in accepted.values()]

    def function(tensors):
        return [
            op(*roles, None, 1e-6, kernel, spec)
            for roles, (op, spec) in zip(tensors, calls, strict=True)
        ]

    lowering.register()
    with torch.no_grad():
        made, code = _code(torch.compile(function, fullgraph=True, dynamic=False), tensors)
    assert not _calls_us(code)
    launch = by_name("triton.row").launch
    for (name, spec), roles, found in zip(accepted.items(), tensors, made, strict=True):
        outputs = found if isinstance(found, tuple) else (found,)
        yield name, spec, outputs, launch(spec, *roles, 1e-6)


# ---- The inlined kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 128), (4, 1000), (300, 4096)])
def test_inlined_equals_launched(shape: tuple[int, int]) -> None:
    for name, _, found, wanted in _every("triton.row", shape):
        assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [
            True for _ in wanted
        ], name


def test_the_pass_leaves_no_call_of_its_own() -> None:
    arguments = (random(64, 1024), random(64, 1024), random(1024), random(1024, 512))
    with torch.no_grad():
        options = {**TRITON, "expect": 1}
        compiled = torch.compile(block, backend=fxpass.rmsnorm_backend, options=options)
        (out, total), code = _code(compiled, *arguments)
        wanted, wanted_total = block(*arguments)
    assert "fxpass_row" in code
    assert not _calls_us(code)
    assert torch.equal(total, wanted_total)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-1)  # flips, through a matmul


def test_heads_of_a_packed_projection_are_read_in_place() -> None:
    def heads(packed, w, projection):
        q = packed.view(-1, 48, 128)[:, 8:16]
        return llama(q, w).flatten(1) @ projection

    arguments = (random(96, 6144), random(128), random(1024, 64))
    with torch.no_grad():
        compiled = torch.compile(heads, backend=fxpass.rmsnorm_backend, options=TRITON)
        _, code = _code(compiled, *arguments)
    (site,) = fxpass.last_report().rewritten
    assert site.bytes_copied == 0
    assert "triton_poi" not in code
    assert not _calls_us(code)


def test_rows_are_never_specialised() -> None:
    w = random(1024)
    compiled = torch.compile(llama, backend=fxpass.rmsnorm_backend, options=TRITON)
    spec = NormSpec.parse(LLAMA)
    with torch.no_grad():
        for count, rows in enumerate((5, 1, 64, 300, 4096)):
            x = random(rows, 1024)
            if rows > 1:
                torch._dynamo.mark_dynamic(x, 0)
            # A batch of one is a graph of its own, everywhere in torch.
            with torch._dynamo.config.patch(error_on_recompile=count > 1):
                found = compiled(x, w)
            (wanted,) = by_name("triton.row").launch(spec, x, None, w, None, 1e-6)
            assert torch.equal(found, wanted)


def test_cuda_graphs_replay() -> None:
    arguments = (random(64, 1024), random(64, 1024), random(1024), random(1024, 512))
    counters.clear()
    with torch.no_grad():
        plain = torch.compile(block, backend=fxpass.rmsnorm_backend, options=TRITON)
        wanted, _ = plain(*arguments)
        torch.compiler.reset()
        captured = torch.compile(
            block,
            backend=fxpass.rmsnorm_backend,
            options={**TRITON, "triton.cudagraphs": True},  # what mode="reduce-overhead" sets
        )
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            out, _ = captured(*arguments)
            assert torch.equal(out, wanted)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_peak_memory_is_no_higher_than_inductors() -> None:
    arguments = (random(8192, 4096), random(8192, 4096), random(4096), random(4096, 64))

    def peak(compiled) -> int:
        with torch.no_grad():
            compiled(*arguments)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            compiled(*arguments)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    plain = peak(torch.compile(block))
    torch.compiler.reset()
    assert peak(torch.compile(block, backend=fxpass.rmsnorm_backend, options=TRITON)) <= plain


def test_training_step() -> None:
    def loss(function, leaves):
        out, total = function(*leaves, projection)
        return torch.autograd.grad(out.float().square().mean() + total.float().sum(), leaves)

    projection = random(512, 256) / 16
    leaves = [random(64, 512), random(64, 512), random(512)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wanted = loss(block, leaves)
    options = {**TRITON, "expect": 1}
    found = loss(torch.compile(block, backend=fxpass.rmsnorm_backend, options=options), leaves)
    for got, want in zip(found, wanted, strict=True):
        # Sums of bf16 values in other orders: a few bf16 ulps of the largest gradient.
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


# ---- Inductor's own code ------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [128, 1000])
def test_pinned_roundings(hidden: int) -> None:
    for name, _, (found, *_), (wanted, *_) in _every("inductor.fused", (200, hidden)):
        if found.dtype == torch.float32:
            close = torch.isclose(found, wanted, rtol=1e-6, atol=1e-6)
            assert close.float().mean() >= 0.999, name  # a flip of a 16-bit step before the last
        else:
            least = 0.95 if name in ROW_STEPS_16BIT else 0.999
            assert (found == wanted).float().mean() >= least, name


def test_auto_keeps_a_gate_in_one_kernel() -> None:
    def gated(x, w, gate):
        return llama(x, w) * torch.nn.functional.silu(gate)

    arguments = (random(4096, 128), random(128), random(4096, 128))
    with torch.no_grad():
        compiled = torch.compile(gated, backend=fxpass.rmsnorm_backend, options={"strict": True})
        _, code = _code(compiled, *arguments)
    (site,) = fxpass.last_report().rewritten
    assert site.kernel == "inductor.fused"
    assert code.count("async_compile.triton(") == 1


# ---- AOTInductor --------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Attention's norms and the first norm of a Llama layer."""

    def __init__(self) -> None:
        super().__init__()
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        self.norm = torch.nn.Parameter(torch.rand(512, **bf16) + 0.5)
        self.q_norm = torch.nn.Parameter(torch.rand(64, **bf16) + 0.5)
        self.qkv = torch.nn.Linear(512, 3 * 512, bias=False, **bf16)
        self.out = torch.nn.Linear(512, 512, bias=False, **bf16)

    def forward(self, x: torch.Tensor, residual: torch.Tensor):
        total = x + residual
        q, k, v = self.qkv(llama(total, self.norm)).view(-1, 3, 8, 64).unbind(1)
        q, k = llama(q, self.q_norm), llama(k, self.q_norm)
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed[0].transpose(0, 1).flatten(1)) + total


LOAD = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
x, residual, wanted = torch.load(sys.argv[2], map_location="cuda")
found = model(x, residual)
assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
assert model(x[:7], residual[:7]).shape == (7, 512)
assert "fxpass" not in sys.modules
"""


def test_a_package_runs_without_fxpass(tmp_path) -> None:
    model = Block().eval()
    x, residual = random(32, 512), random(32, 512)
    rows = torch.export.Dim("rows", min=2, max=4096)
    package, data = tmp_path / "model.pt2", tmp_path / "data.pt"
    with torch.no_grad():
        exported = torch.export.export(model, (x, residual), dynamic_shapes=({0: rows}, {0: rows}))
        with fxpass.install(strict=True) as installed:
            torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
        torch.save((x, residual, model(x, residual)), data)
    kernels = {site.kernel for site in installed.report.rewritten}
    assert len(installed.report.rewritten) == 3
    assert kernels <= {"triton.row", "inductor.fused"}
    done = _run_clean(LOAD, package, data)
    if done.returncode < 0 and not _packages_load(tmp_path):
        pytest.skip("AOTInductor packages crash here, Inductor's own included: try another CXX")
    assert done.returncode == 0, done.stderr[-2000:]


def _run_clean(text: str, *arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _packages_load(folder) -> bool:
    """Whether a package without any norm loads in a clean process (one C++ compiler's did not)."""
    package = folder / "plain.pt2"
    exported = torch.export.export(torch.nn.ReLU(), (random(4, 4),))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    text = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    return _run_clean(text, package).returncode == 0
