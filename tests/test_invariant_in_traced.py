"""The mode entered by code that torch.compile compiles: the block runs in it, uncompiled."""

import warnings

import pytest
import torch

import fxpass

pytestmark = pytest.mark.filterwarnings("ignore:fxpass. batch_invariant_mode")

BACKENDS = ("inductor", "aot_eager", "eager")
WEIGHT = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def work(x: torch.Tensor) -> torch.Tensor:
    """Has other bits with other rows: products on a CPU do."""
    return torch.softmax(torch.mm(x, WEIGHT), -1)


def in_block(x):
    y = x + 1
    with fxpass.batch_invariant_mode():
        z = work(y)
    return z * 2


@fxpass.batch_invariant_mode()
def decorated(x):
    return work(x + 1) * 2


class Module(torch.nn.Module):
    def forward(self, x):
        return decorated(x)


def data() -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(1))


def wanted(x: torch.Tensor) -> torch.Tensor:
    with fxpass.batch_invariant_mode():
        return work(x + 1) * 2


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def test_the_case_can_tell() -> None:
    x = data()
    assert not torch.equal(work(x[:1] + 1) * 2, wanted(x)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [in_block, decorated, Module()], ids=["with", "def", "module"])
def test_rows_are_those_of_eager_code(function, backend: str) -> None:
    x = data()
    compiled = torch.compile(function, backend=backend)
    expected = wanted(x)
    assert torch.equal(compiled(x), expected)
    for count in (1, 7, 33):
        assert torch.equal(compiled(x[:count]), expected[:count])


def test_code_after_the_block_is_compiled() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    def later(x):
        return torch.sin(torch.cos(x))

    @torch.compile(backend=backend)
    def function(x):
        with fxpass.batch_invariant_mode():
            first = work(x)
        return later(first)

    function(data())
    called = [target for graph in graphs for target in graph]
    assert torch.cos in called
    assert torch.mm not in called  # it ran in the block


def test_an_exception_in_the_block_leaves_the_mode() -> None:
    def function(x):
        with fxpass.batch_invariant_mode():
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        torch.compile(function, backend="eager")(data())
    x = data()
    assert torch.equal(work(x), torch.softmax(torch.mm(x, WEIGHT), -1))
    assert torch.equal(torch.compile(work, backend="eager", fullgraph=True)(x), work(x))


def test_left_for_a_while() -> None:
    def function(x):
        with fxpass.batch_invariant_mode(False):
            return work(x)

    x = data()
    plain = work(x)
    with fxpass.batch_invariant_mode():
        assert torch.equal(torch.compile(function, backend="eager")(x), plain)


def test_switched_on_for_all() -> None:
    def function(x):
        fxpass.enable_batch_invariant()
        try:
            return work(x + 1) * 2
        finally:
            fxpass.disable_batch_invariant()

    x = data()
    assert torch.equal(torch.compile(function, backend="aot_eager")(x), wanted(x))


@pytest.mark.filterwarnings("always")
def test_says_so_once_a_call() -> None:
    compiled = torch.compile(in_block, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(data())
        with fxpass.batch_invariant_mode():  # not in compiled code
            work(data())
    (one,) = [str(w.message) for w in caught if "fxpass" in str(w.message)]
    assert 'options={"batch_invariant": True}' in one


def test_a_whole_graph_is_refused_in_words() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"batch_invariant_mode\(\) inside"):
        torch.compile(in_block, backend="eager", fullgraph=True)(data())
