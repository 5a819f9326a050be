"""Compiled mode: rows, the bits of eager mode, training graphs, and what the graph calls."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import fxpass
from fxpass.errors import OptionsError

OPTIONS = {"batch_invariant": True, "strict": True}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    fxpass.reset_report()


def compiled(call, **kwargs):
    return torch.compile(call, backend=fxpass.rmsnorm_backend, options=OPTIONS, **kwargs)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype)


W, BIAS, FILTERS = matrix(40, 64), matrix(40), matrix(8, 5, 3)

OPS = {
    "mm": lambda x: x[:, 0] @ W.to(x.dtype).t(),
    "linear": lambda x: F.linear(x, W.to(x.dtype), BIAS.to(x.dtype)),
    "linear of a transposed one": lambda x: F.linear(
        x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
        W.to(x.dtype),
        BIAS.to(x.dtype),
    ),
    "bmm": lambda x: x @ x.mT,
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, alpha=2, beta=0.5),
    "softmax": lambda x: F.softmax(x, -1),
    "softmax to float32": lambda x: F.softmax(x, 1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "sum": lambda x: x.sum((1, 2)),
    "mean": lambda x: x.mean(1, keepdim=True),
    "mean in float32": lambda x: x.mean(-1, dtype=torch.float32),
    "norm": lambda x: x.norm(dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "var": lambda x: x.var((1, 2), keepdim=True),
    "std": lambda x: x.std(-1),
    "cumsum": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x, (64,), W[0].to(x.dtype), W[1].to(x.dtype)),
    "rms_norm": lambda x: F.rms_norm(x, (64,), W[0].to(x.dtype)),
    "rms_norm of two dims": lambda x: F.rms_norm(x, (5, 64)),
    "attention": lambda x: F.scaled_dot_product_attention(
        *(x.unflatten(2, (4, 16)).transpose(1, 2),) * 3, is_causal=True
    ),
    "group_norm": lambda x: F.group_norm(x.mT, 4),
    "conv1d": lambda x: F.conv1d(x, FILTERS.to(x.dtype), W[0, :8].to(x.dtype), padding=1),
    "conv1d of each channel": lambda x: F.conv1d(x, FILTERS[:5, :1].to(x.dtype), groups=5),
    "conv2d with channels innermost": lambda x: F.conv2d(
        x.unflatten(2, (8, 8)).to(memory_format=torch.channels_last),
        FILTERS.unsqueeze(-1).to(x.dtype),
        stride=2,
    ),
    "conv_transpose1d": lambda x: F.conv_transpose1d(
        x, FILTERS[:5].to(x.dtype), stride=2, output_padding=1
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_operator_has_the_bits_of_eager_mode(dtype: torch.dtype) -> None:
    x = matrix(6, 5, 64, dtype=dtype)

    def everything(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(op(x) for op in OPS.values())

    with torch.no_grad():
        found = compiled(everything)(x)
        with fxpass.batch_invariant_mode():
            wanted = everything(x)
    for name, ours, theirs in zip(OPS, found, wanted, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_of_each_operator(dynamic: bool) -> None:
    x = matrix(6, 5, 64, dtype=torch.bfloat16)

    def everything(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(op(x) for op in OPS.values())

    call = compiled(everything, dynamic=dynamic)
    with torch.no_grad():
        whole = call(x)
        for rows in (1, 2, 5):
            for name, some, all_rows in zip(OPS, call(x[6 - rows :]), whole, strict=True):
                assert torch.equal(some, all_rows[6 - rows :]), (name, rows)


def test_products_of_experts() -> None:
    """Which rows an expert gets is known at run time; a row's bits are those it has alone."""
    weights = matrix(4, 64, 24, dtype=torch.bfloat16)  # the only dtype torch traces

    def experts(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x * 2, weights, offs=ends) + 1

    call = compiled(experts)
    x = matrix(9, 64, dtype=torch.bfloat16)
    ends = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    with torch.no_grad():
        found = call(x, ends)
        with fxpass.batch_invariant_mode():
            assert torch.equal(found, experts(x, ends))
        for row, expert in ((0, 0), (3, 2), (7, 2), (8, 3)):
            only = torch.arange(4, dtype=torch.int32).ge(expert).int()
            assert torch.equal(call(x[row : row + 1], only)[0], found[row]), row


def test_products_of_experts_by_an_operator_of_transformers() -> None:
    """What they are in a compiled graph where the dtype is not bfloat16."""
    pytest.importorskip("transformers.integrations.moe")
    fallback = torch.ops.transformers.grouped_mm_fallback
    weights, ends = matrix(4, 64, 24), torch.tensor([3, 3, 8, 9], dtype=torch.int32)

    call = compiled(lambda x, ends: fallback(x * 2, weights, ends) + 1, fullgraph=True)
    x = matrix(9, 64)
    with torch.no_grad():
        found = call(x, ends)
        assert fxpass.last_report().invariant == {"fxpass.bi_grouped_matmul": 1}
        with fxpass.batch_invariant_mode():
            assert torch.equal(found, fallback(x * 2, weights, ends) + 1)
        assert torch.equal(call(x[3:4], torch.tensor([0, 0, 1, 1], dtype=torch.int32)), found[3:4])
    weights.requires_grad_()
    (made,) = torch.autograd.grad(call(x, ends).sin().sum(), weights)
    (wanted,) = torch.autograd.grad((fallback(x * 2, weights, ends) + 1).sin().sum(), weights)
    weights.requires_grad_(False)
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", [F.softplus, lambda x: x.abs().log1p()], ids=["softplus", "log1p"])
def test_elements_that_do_not_fill_a_vector(call) -> None:
    """Inductor computes them one by one if it deems so few not worth a vector, in other bits."""
    x = 3 * matrix(257, 3)
    whole = compiled(call, dynamic=False)(x)
    for rows in (1, 8):
        assert torch.equal(compiled(call, dynamic=False)(x[:rows].clone()), whole[:rows]), rows


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=131, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, None])
def test_rows_of_a_small_llama(dynamic: bool | None) -> None:
    model = llama()
    call = compiled(model, dynamic=dynamic)
    ids = torch.randint(0, 131, (9, 11))
    with torch.no_grad():
        whole = call(ids, use_cache=False).logits
        for rows in (1, 2, 3, 8):
            for start in (0, 9 - rows):
                some = call(ids[start : start + rows], use_cache=False).logits
                assert torch.equal(some, whole[start : start + rows]), (rows, start)
    assert len(fxpass.last_report().rewritten) >= 3


def test_training() -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.RMSNorm(32), torch.nn.GELU(), torch.nn.LayerNorm(32)
    )
    x = matrix(6, 64)
    call = compiled(net)
    loss = F.log_softmax(call(x), -1)[:, 0].sum()
    found = torch.autograd.grad(loss, list(net.parameters()))
    wanted = torch.autograd.grad(F.log_softmax(net(x), -1)[:, 0].sum(), list(net.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(call(x)[2:3], call(x[2:3]))


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_has_gradients(heads: int) -> None:
    inputs = [matrix(2, h, 7, 16).requires_grad_() for h in (4, heads, heads)]
    mask = torch.ones(7, 7, dtype=torch.bool).tril()

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    wanted = torch.autograd.grad(attend(*inputs).sin().sum(), inputs)
    found = torch.autograd.grad(compiled(attend)(*inputs).sin().sum(), inputs)
    with fxpass.batch_invariant_mode():
        eager = torch.autograd.grad(attend(*inputs).sin().sum(), inputs)
    for ours, theirs, ours_in_eager in zip(found, wanted, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours_in_eager, theirs, rtol=1e-3, atol=1e-4)


def test_the_report_and_the_code() -> None:
    from torch._inductor.utils import run_and_get_code

    x = matrix(6, 5, 64)
    call = compiled(lambda x: F.softmax(F.rms_norm(x, (64,)) @ W.t(), -1).sum(1))
    with torch.no_grad():
        _, code = run_and_get_code(call, x)
    report = fxpass.last_report()
    assert report.invariant == {
        "fxpass.bi_matmul": 1,
        "fxpass.bi_row_softmax": 1,
        "fxpass.bi_row_sum": 1,
    }
    assert fxpass.Report.from_dict(report.to_dict()).invariant == report.invariant
    assert "extern_kernels.fxpass_invariant['matmul']" in code[0]
    assert not re.search(r"torch\.ops\.fxpass[\w.]*\(", code[0]), "called without the dispatcher"


def test_only_kernels_that_are_invariant_are_chosen() -> None:
    with pytest.raises(Exception, match=r"refused reference.eager: not batch-invariant"):
        torch.compile(
            torch.nn.RMSNorm(64),
            backend=fxpass.rmsnorm_backend,
            options={**OPTIONS, "providers": ("reference",), "expect": 1},
        )(matrix(3, 64))


def test_integers_stay_torchs() -> None:
    x = torch.arange(12).view(3, 4)
    call = compiled(lambda x: (x.sum(), x.cumsum(1), x.float().prod(-1)))
    with torch.no_grad():
        found = call(x)
    assert [t.tolist() for t in found[:2]] == [66, x.cumsum(1).tolist()]
    assert fxpass.last_report().invariant == {}


def test_rewrite_says_that_it_is_for_the_backend() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    with pytest.raises(OptionsError, match="batch_invariant is for the backend"):
        fxpass.rewrite(graph, matrix(2, 2), batch_invariant=True)


def test_the_pass_alone_rewrites_what_reaches_it() -> None:
    x = matrix(6, 64)
    with fxpass.install(batch_invariant=True, strict=True) as installed, torch.no_grad():
        torch.compile(lambda x: (x @ W.t()).mean(-1))(x)
    assert installed.report.invariant == {"fxpass.bi_matmul": 1, "fxpass.bi_row_mean": 1}


def test_code_from_the_cache_of_another_process() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.utils import fresh_cache

    from fxpass.invariant.compiled import register

    def call(x):
        return F.softmax(x @ W.t(), -1)

    x = matrix(3, 64)
    with torch.no_grad(), fresh_cache():
        wanted = compiled(call)(x)
        torch._dynamo.reset()
        del extern_kernels.fxpass_invariant  # as in a process that has not compiled anything
        register.cache_clear()
        counters.clear()
        assert torch.equal(compiled(call)(x), wanted)
        hits = (
            counters["aot_autograd"]["autograd_cache_hit"]
            + counters["inductor"]["fxgraph_cache_hit"]
        )
        assert hits, "the cache is on"


@pytest.mark.parametrize("option", ["numerics", "batch_invariant"])
def test_a_setting_that_an_option_needs_is_not_overridden(option: str) -> None:
    options = {option: "eager" if option == "numerics" else True, "emulate_precision_casts": False}
    call = torch.compile(torch.relu, backend=fxpass.rmsnorm_backend, options=options)
    with pytest.raises(Exception, match="needs emulate_precision_casts=True, found False"):
        call(torch.ones(3))


# ---- What torch.compile leaves to eager code -----------------------------------------------------


class Broken(torch.nn.Module):
    """A graph, eager code, a graph: Dynamo leaves a recurrent layer and what follows a break."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = torch.nn.GRU(64, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, W)
        torch._dynamo.graph_break()
        return self.recurrent(torch.cat([y, x[..., :24]], -1))[0].softmax(-1)


@torch.no_grad()
def test_eager_parts_of_a_compiled_model_are_in_the_mode_inside_it() -> None:
    torch.manual_seed(0)
    model, x = Broken().eval(), matrix(7, 5, 64)
    call = compiled(model)
    with fxpass.batch_invariant_mode():
        whole = call(x)
        assert torch.equal(torch.cat([call(row) for row in x.split(1)]), whole)
        # Its pieces are eager mode's own: Dynamo compiles no frame of them.
        assert torch.equal(model(x), whole)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_gradients_of_eager_parts_are_eager_modes() -> None:
    """Head size 12: the formulas are written out in Python, which Dynamo could compile."""

    def step(q, k, v, g):
        attended = torch.compiler.disable(F.scaled_dot_product_attention)(q, k, v)
        torch._dynamo.graph_break()
        attended.backward(g)

    given = [matrix(7, 1, 5, 12) + i for i in range(4)]
    found = []
    for call in (step, torch.compile(step)):
        leaves = [t.clone().requires_grad_() for t in given[:3]]
        with fxpass.batch_invariant_mode():
            call(*leaves, given[3])
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_dynamo_compiles_no_kernel_of_the_mode() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(node.stack_trace) for node in graph.graph.nodes if node.stack_trace)
        return graph

    with fxpass.batch_invariant_mode():
        torch.compile(Broken().eval(), backend=backend)(matrix(7, 5, 64))
    assert seen
    assert not [trace for trace in seen if "invariant/" in trace.replace("\\", "/")]
