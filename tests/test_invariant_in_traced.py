"""The mode entered by code that torch.compile compiles: the block runs in it, uncompiled."""

import threading
import warnings

import pytest
import torch

import fxpass
from fxpass.invariant.mode import active

pytestmark = pytest.mark.filterwarnings("ignore:fxpass. ")

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


class Counting:
    """A backend that runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def dynamo() -> object:
    """What compiles this thread's frames."""
    callback = torch._C._dynamo.eval_frame.set_eval_frame(None)
    torch._C._dynamo.eval_frame.set_eval_frame(callback)
    return callback


def test_an_exception_in_the_block_leaves_the_mode() -> None:
    backend = Counting()

    def function(x, caught):
        try:
            with fxpass.batch_invariant_mode():
                raise KeyError("mine")
        except KeyError:
            if not caught:
                raise
        return later(x)

    def later(x):
        return torch.sin(x)

    compiled = torch.compile(function, backend=backend)
    with pytest.raises(KeyError, match="mine"):
        compiled(data(), caught=False)
    assert (active(), dynamo(), backend.graphs) == (False, None, 0)
    compiled(data(), caught=True)
    assert (active(), dynamo(), backend.graphs) == (False, None, 1)


def test_a_block_closed_elsewhere_leaves_dynamo_off() -> None:
    backend = Counting()

    def stream(x):
        with fxpass.batch_invariant_mode():
            while True:
                yield work(x)

    streams = []

    @torch.compile(backend=backend)
    def step(x):
        if not streams:
            streams.append(stream(x))
        return next(streams[0])

    step(data())
    assert active()  # the block is open
    streams.pop().close()
    assert (active(), dynamo()) == (False, None)
    before = backend.graphs
    torch.cos(data())
    assert backend.graphs == before


def test_a_block_closed_by_compiled_code_leaves_dynamo_on() -> None:
    backend = Counting()

    def stream():
        with fxpass.batch_invariant_mode():
            yield

    opened = stream()
    next(opened)

    def later(x):
        return torch.sin(x)

    @torch.compile(backend=backend)
    def function(x):
        opened.close()
        return later(x)

    function(data())
    assert (active(), dynamo()) == (False, None)
    assert backend.graphs


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    compiled = torch.compile(in_block, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="runs uncompiled"):
            compiled(data())
    assert (active(), dynamo()) == (False, None)


def test_one_object_for_several_threads() -> None:
    mode, x = fxpass.batch_invariant_mode(), data()
    inside, done = threading.Event(), threading.Event()
    seen = []

    def compiled_in_a_thread():
        def function(x):
            with mode:
                inside.set()
                done.wait(20)
                return work(x)

        torch.compile(function, backend="eager")(x)
        seen.append((active(), dynamo()))

    thread = threading.Thread(target=compiled_in_a_thread)
    thread.start()
    assert inside.wait(60)
    with mode:
        assert active()
    assert (active(), dynamo()) == (False, None)
    done.set()
    thread.join()
    assert seen == [(False, None)]


def test_closed_by_another_thread() -> None:
    mode = fxpass.batch_invariant_mode()
    entering = threading.Thread(target=mode.__enter__)
    entering.start()
    entering.join()
    with fxpass.batch_invariant_mode():
        mode.__exit__(None, None, None)
        assert active()
    assert not active()


def test_left_for_a_while() -> None:
    def function(x):
        with fxpass.batch_invariant_mode(False):
            return work(x)

    x = data()
    plain = work(x)
    with fxpass.batch_invariant_mode():
        assert torch.equal(torch.compile(function, backend="eager")(x), plain)


def test_switched_on_for_all() -> None:
    backend = Counting()

    @torch.compile(backend=backend)
    def function(x):
        y = torch.sin(x)
        fxpass.enable_batch_invariant()
        inside = active()
        fxpass.disable_batch_invariant()
        return torch.cos(y), inside

    with pytest.warns(RuntimeWarning, match="does not reach what follows"):
        assert function(data())[1]
    assert (active(), dynamo()) == (False, None)
    assert backend.graphs == 2  # one until the mode, one after


@pytest.mark.filterwarnings("always")
def test_says_so_once_a_call() -> None:
    compiled = torch.compile(in_block, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(data())
        with fxpass.batch_invariant_mode():  # not in compiled code
            work(data())
    (one,) = [w for w in caught if "fxpass" in str(w.message)]
    assert 'options={"batch_invariant": True}' in str(one.message)
    assert one.filename == __file__


def test_a_whole_graph_is_refused_in_words() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"batch_invariant_mode\(\) inside"):
        torch.compile(in_block, backend="eager", fullgraph=True)(data())
