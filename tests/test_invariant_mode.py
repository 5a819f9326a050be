"""The eager mode: who is in it, what is restored, and that rows do not follow their batch."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F

import fxpass
from fxpass.invariant import mode, pointwise
from fxpass.invariant.table import COMPOSITES, CPU_POINTWISE, LEAVES

A, B = torch.randn(7, 300), torch.randn(300, 11)


def dumps() -> dict[str, str]:
    """What the dispatcher says of every operator the mode replaces."""
    names = [f"aten::{name}" for name in (*LEAVES, *CPU_POINTWISE, *COMPOSITES)]
    return {n: torch._C._dispatch_dump(n) for n in names if torch._C._dispatch_has_kernel(n)}


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_nested_failing_and_off_again() -> None:
    def fail() -> None:
        with fxpass.batch_invariant_mode():
            with fxpass.batch_invariant_mode():
                assert mode.active()
                with fxpass.batch_invariant_mode(enabled=False):
                    assert not mode.active()
            assert mode.active()
            raise ZeroDivisionError

    assert not mode.active()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not mode.active()


def test_everything_is_as_before() -> None:
    before = dumps()
    with fxpass.batch_invariant_mode():
        assert dumps() != before
    assert dumps() == before


def test_another_library_is_kept_used_and_restored() -> None:
    library = torch.library.Library("aten", "IMPL")
    calls = []
    kernel = torch.library.get_kernel("aten::dot", "CPU")

    def theirs(keys, x, y):
        calls.append(1)
        return kernel.call_boxed(keys, x, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the first override of a process
        library.impl("dot", theirs, "CPU", with_keyset=True, allow_override=True)
    x = torch.randn(9)
    torch.dot(x, x)
    with fxpass.batch_invariant_mode():
        torch.dot(x, x)
        assert len(calls) == 1, "in the mode it is ours"
        in_a_thread(lambda: torch.dot(x, x))
        assert len(calls) == 2, "outside it is theirs"
    torch.dot(x, x)
    assert len(calls) == 3
    assert "aten/dot/CPU" in torch.library._impls, "torch still knows of it"
    library._destroy()
    del library
    gc.collect()
    torch.dot(x, x)
    assert len(calls) == 3


def test_another_thread_keeps_torchs_bits() -> None:
    x = torch.randn(33, 5001)

    def work():
        return mode.active(), x @ x.mT, x.sum(-1), F.softmax(x, -1), x.norm(), F.silu(x.mT)

    wanted = work()
    with fxpass.batch_invariant_mode():
        found = in_a_thread(work)
        ours = work()
    assert (wanted[0], found[0], ours[0]) == (False, False, True)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours[1:], wanted[1:], strict=True))


def test_enable_is_for_all_threads() -> None:
    fxpass.enable_batch_invariant()
    try:
        fxpass.enable_batch_invariant()
        assert in_a_thread(mode.active)
    finally:
        fxpass.disable_batch_invariant()
    assert not mode.active()
    fxpass.disable_batch_invariant()  # once too often is no error
    with fxpass.batch_invariant_mode():
        fxpass.enable_batch_invariant()
        fxpass.disable_batch_invariant()
        assert mode.active()


def test_threads_enter_and_leave_at_once() -> None:
    with fxpass.batch_invariant_mode():
        wanted = A @ B

    def work() -> bool:
        same = True
        for _ in range(20):
            with fxpass.batch_invariant_mode():
                same &= torch.equal(A @ B, wanted)
        return same

    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_autograd_is_in_the_mode_that_called_it() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(mode.active())
            return grad

    x = torch.randn(3, requires_grad=True)
    with fxpass.batch_invariant_mode():
        Look.apply(x).sum().backward()
    Look.apply(x).sum().backward()
    assert seen == [True, False]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_follow_their_batch(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(9, 3, 77, dtype=dtype), torch.randn(50, 77, dtype=dtype)
    bias = torch.randn(50, dtype=dtype)

    def work(x: torch.Tensor) -> list[torch.Tensor]:
        y = F.linear(x, w, bias)
        q = y.view(*y.shape[:2], 2, 25).transpose(1, 2)
        return [
            y, F.linear(x.transpose(0, 1).contiguous().transpose(0, 1), w, bias),
            F.softmax(y, -1), F.log_softmax(y, 1), F.layer_norm(y, (50,)), F.rms_norm(y, (3, 50)),
            y.sum((1, 2)), y.float().pow(2).mean(-1), y.norm(dim=-1), y.logsumexp(-1), y.var(-1),
            y.cumsum(-1), F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.silu(y), F.gelu(y), y.sigmoid(), y.rsqrt(), F.silu(y.mT).mT, torch.matmul(x, w.t()),
        ]  # fmt: skip

    with fxpass.batch_invariant_mode():
        whole = work(x)
        part = work(x[9 - rows :])
    for index, (all_rows, some) in enumerate(zip(whole, part, strict=True)):
        assert torch.equal(all_rows[9 - rows :].nan_to_num(), some.nan_to_num()), index


def test_linear_rounds_once_whatever_the_strides() -> None:
    """torch adds the bias after rounding where a batch of two is transposed, but not one of one."""
    x = torch.randn(5, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
    w, bias = torch.randn(32, 64, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    with fxpass.batch_invariant_mode():
        both, one = F.linear(x, w, bias), F.linear(x[:1], w, bias)
        assert torch.equal(both[:1], one)
        assert torch.equal(both, F.linear(x.contiguous(), w, bias))


def test_vmap_fake_tensors_and_subclasses() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with fxpass.batch_invariant_mode():
        rows = torch.vmap(lambda r: F.softmax(r @ B, -1))(A)
        torch.testing.assert_close(rows, F.softmax(A @ B, -1))
        with FakeTensorMode() as fake:
            x = fake.from_tensor(A)
            assert F.rms_norm(x @ fake.from_tensor(B), (11,)).shape == (7, 11)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (A @ B).dtype == torch.bfloat16
        with torch.inference_mode():
            assert torch.equal(A @ B, torch.mm(A, B))


def test_rms_norm_has_the_same_bits_with_and_without_gradients() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(6, 2, 100, dtype=dtype), torch.randn(2, 100, dtype=dtype)
        with fxpass.batch_invariant_mode():
            fused = F.rms_norm(x, (2, 100), w)
            opened = F.rms_norm(x.clone().requires_grad_(), (2, 100), w)
        assert torch.equal(fused, opened)


def test_element_wise_operators_that_vary_are_replaced() -> None:
    """Measured: torch's bits at the end of a tensor, or in a strided one, against the middle's."""
    x = torch.randn(1003)
    varying = {}
    for name in ("exp2", "sigmoid", "sinh", "atanh", "cosh"):
        whole, strided = (getattr(torch, name)(v) for v in (x, torch.stack([x, x], -1)[:, 0]))
        varying[name] = not torch.equal(whole.nan_to_num(), strided.nan_to_num())
    assert {name for name, varies in varying.items() if varies} <= set(pointwise.NAMES)
    with fxpass.batch_invariant_mode():
        for name in [n for n in CPU_POINTWISE if n in ("exp2", "sigmoid", "silu", "mish", "elu")]:
            op = getattr(torch.ops.aten, name)
            whole = op(x)
            assert torch.equal(whole[-3:], op(x[-3:])), name
            assert torch.equal(whole, op(torch.stack([x, x], -1)[:, 0])), name


@pytest.mark.parametrize("shape", [(37, 53), (64, 64), (3, 5, 7), (11, 1, 7), (3, 16, 64)])
def test_elements_of_a_permuted_tensor(shape: tuple[int, ...]) -> None:
    """In memory order, where they lie; the bits are those of a contiguous tensor all the same."""
    x = torch.rand(shape).mT
    calls: list[Callable[..., torch.Tensor]] = [
        torch.sigmoid, torch.rsqrt, F.silu, lambda t: torch.pow(t, t), lambda t: t.clone().cosh_(),
        lambda t: torch.sinh(t, out=torch.empty_like(t)), lambda t: torch.hypot(t, t.contiguous()),
    ]  # fmt: skip
    calls += [F.gelu, lambda t: torch.pow(1.7, t), lambda t: F.gelu(t, approximate="tanh")]
    for call in calls:
        wanted = call(x).stride()
        with fxpass.batch_invariant_mode():
            found = call(x)
            assert torch.equal(found, call(x.contiguous()))
        assert found.stride() == wanted


def test_rows_of_a_tensor_whose_batch_comes_second() -> None:
    """gelu of a permuted tensor is another function of torch's than of a contiguous one."""
    x = torch.randn(16, 3, 64)
    with fxpass.batch_invariant_mode():
        whole = F.gelu(x.transpose(0, 1))
        for rows in (1, 2):
            assert torch.equal(F.gelu(x[:, :rows].contiguous().transpose(0, 1)), whole[:rows])


def test_a_result_of_no_size_yet() -> None:
    x = torch.randn(7, 9)
    with fxpass.batch_invariant_mode():
        assert torch.equal(torch.atan2(x, x.abs(), out=torch.empty(0)), torch.atan2(x, x.abs()))


def test_threads_outside_while_others_enter_and_leave() -> None:
    """A kernel that another thread is about to enter must outlive its registration."""
    x, found, stop = torch.rand(5, 37), list[Exception](), threading.Event()

    def outside() -> None:
        try:
            while not stop.is_set():
                F.softmax(x @ x.mT, -1).sum(-1)
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=outside) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        with fxpass.batch_invariant_mode():
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not found


def test_results_lie_in_memory_as_torchs() -> None:
    q, other = torch.rand(2, 3, 4, 8), torch.rand(2, 3, 5, 12)
    queries = q, q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT, q[..., :3, :]
    calls = [
        *(lambda q=q, v=v: F.scaled_dot_product_attention(q, other[..., :8], v)
          for q in queries for v in (other, other[..., :8])),
        lambda: F.glu(q.permute(1, 3, 0, 2), 1), lambda: F.silu(q.mT),
    ]  # fmt: skip
    wanted = [call().stride() for call in calls]
    with fxpass.batch_invariant_mode():
        assert [call().stride() for call in calls] == wanted


def test_norm_of_a_tensor_whose_sign_waits() -> None:
    x = torch._neg_view(torch.rand(3, 8))
    with fxpass.batch_invariant_mode():
        torch.testing.assert_close(F.rms_norm(x, (8,)), F.rms_norm(x.clone(), (8,)))


def test_products_of_nothing_are_the_bias() -> None:
    bias = torch.rand(4)
    with fxpass.batch_invariant_mode():
        for shape in ((3, 0), (2, 3, 0), (0,)):
            made = F.linear(torch.empty(shape), torch.empty(4, 0), bias)
            assert torch.equal(made, bias.expand(*shape[:-1], 4))


def test_what_torch_refuses_is_refused() -> None:
    q, x = torch.rand(2, 3, 4, 8), torch.rand(3, 8)
    calls = [
        lambda: F.scaled_dot_product_attention(q, q, q, torch.ones(4, dtype=torch.bool)),
        lambda: F.layer_norm(x, (8,), x[0].bfloat16()),
        lambda: F.layer_norm(x.bfloat16(), (8,), x[0], x[0].bfloat16()),
        lambda: x.sum((0, -2)), lambda: F.softmax(x, 2), lambda: x @ x,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises((IndexError, RuntimeError)) as wanted:
            call()
        with fxpass.batch_invariant_mode(), pytest.raises(wanted.type):
            call()


def test_a_mean_is_rounded_once() -> None:
    x = torch.tensor([[1.0038, 1.0038, 1.0038, 1.005]])  # 1, 1, 1, 1.0078 in bfloat16
    with fxpass.batch_invariant_mode():
        out = torch.mean(x, 1, out=torch.empty(1, dtype=torch.bfloat16))
        assert out.item() == x.mean(1, dtype=torch.bfloat16).item() == 1.0078125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_powers_of_strided_elements(dtype: torch.dtype) -> None:
    x = torch.rand(1003).to(dtype)
    with fxpass.batch_invariant_mode():
        for exponent in (0, 0.5, 1, 2, 3, -0.5, 1.7):
            whole = x**exponent
            for part in (torch.stack([x, x], -1)[:, 0], x[1:], x[-1:]):
                assert torch.equal(part**exponent, whole[-len(part) :]), exponent


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 8, 6, 6),
    "channels innermost": lambda: torch.randn(2, 6, 6, 8).permute(0, 3, 1, 2),
    "permuted": lambda: torch.randn(2, 6, 8, 6).transpose(1, 2),
    "one element": lambda: torch.randn(2, 8, 1, 1),
    "every second": lambda: torch.randn(2, 8, 6, 12)[..., ::2],
    "one sample": lambda: torch.randn(1, 8, 6, 6),
}
OF_ANY_LAYOUT = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "group_norm with a weight": lambda x: F.group_norm(x, 2, torch.ones(8)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "rms_norm of two dims": lambda x: F.rms_norm(x, x.shape[-2:]),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax of the last": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 2),
    "sum": lambda x: x.sum(1),
    "sum of two dims": lambda x: x.sum((0, 2), keepdim=True),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: x.norm(dim=1),
    "var": lambda x: x.var((1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_in_memory_as_torch_s(layout: str) -> None:
    x = LAYOUTS[layout]()
    wanted = [call(x) for call in OF_ANY_LAYOUT.values()]
    with fxpass.batch_invariant_mode():
        found = [call(x) for call in OF_ANY_LAYOUT.values()]
    for name, ours, theirs in zip(OF_ANY_LAYOUT, found, wanted, strict=True):
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride()), name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _operand(random: Random, shape: list[int]) -> torch.Tensor:
    """Contiguous, permuted, strided, expanded or to be broadcast."""
    order = random.sample(range(len(shape)), len(shape))
    back = [order.index(dim) for dim in range(len(shape))]
    kind = random.choice(["contiguous", "permuted", "strided", "expanded", "broadcast"])
    if kind == "contiguous":
        return torch.rand(shape) + 0.1
    if kind in ("permuted", "strided"):
        step = 2 if kind == "strided" else 1
        whole = torch.rand([step * shape[dim] for dim in order]) + 0.1
        return whole[(slice(None, None, step),) * len(shape)].permute(back)
    fewer = torch.rand([random.choice([1, size]) for size in shape]) + 0.1
    return fewer.expand(shape) if kind == "expanded" else fewer


@pytest.mark.parametrize(
    ("call", "count"),
    [(torch.pow, 2), (torch.atan2, 2), (torch.logaddexp, 2), (F.silu, 1), (F.glu, 1)],
    ids=["pow", "atan2", "logaddexp", "silu", "glu"],
)
def test_strides_of_any_operands(call, count: int) -> None:
    random = Random(count)
    with fxpass.batch_invariant_mode():  # entered once: that takes milliseconds
        for _ in range(300):
            shape = [*(random.randint(1, 5) for _ in range(random.randint(1, 3))), 4]
            given = [_operand(random, shape) for _ in range(count)]
            if call is F.glu and given[0].shape[-1] == 1:
                continue
            with fxpass.batch_invariant_mode(False):
                wanted = call(*given)
            found = call(*given)
            places = [(tuple(t.shape), t.stride()) for t in given]
            assert (found.shape, found.stride()) == (wanted.shape, wanted.stride()), places
            assert torch.allclose(found, wanted), places
