"""Convolutions in the mode: torch's results, of samples that do not know each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from invariant_convolution_cases import CASES, LAYOUTS, check, laid_out, tensors

import fxpass
from fxpass.invariant.recorder import Recorder
from fxpass.kernels.invariant import convolve

F32, BF16 = torch.float32, torch.bfloat16


def name(case) -> str:
    rank, transposed, groups, geometry = case
    return f"{'transposed ' * transposed}{rank}d {geometry} {groups} groups"


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_beside_torch(case, layout: str) -> None:
    check(case, layout, F32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16])
@pytest.mark.parametrize("case", CASES[::5], ids=name)
def test_dtypes(case, dtype: torch.dtype) -> None:
    check(case, "contiguous", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16, F32])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_on_a_gpu(case, dtype: torch.dtype, precision: str, monkeypatch) -> None:
    if precision == "tf32" and dtype != F32:
        pytest.skip("a question of float32 alone")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
    cut = 2 * 2.0**-10 if precision == "tf32" else 0.0  # two operands, cut to ten bits
    for layout in LAYOUTS:
        check(case, layout, dtype, "cuda", cut)


@settings(max_examples=60)
@given(st.data())
def test_any_geometry(data) -> None:
    rank = data.draw(st.integers(1, 3))
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 2)
    transposed, groups = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 3]))
    inside, outside = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    x = torch.randn(3, inside, *each(1, 7))
    shape = (inside, outside // groups) if transposed else (outside, inside // groups)
    weight = torch.randn(*shape, *kernel)
    more = [data.draw(st.integers(0, s - 1)) for s in stride] if transposed else [0] * rank
    arguments = (None, stride, padding, dilation, transposed, more, groups)

    def run(x, weight):
        try:
            return torch.ops.aten.convolution(x, weight, *arguments)
        except RuntimeError as error:
            return str(error)

    wanted = run(x, weight)
    with fxpass.batch_invariant_mode():
        found = run(x, weight)
        if isinstance(found, str):
            assert found == wanted, "torch's own refusal"
            return
        if not found.numel():
            return  # torch's, which takes some empty results and refuses others
        assert torch.equal(run(x[1:2], weight), found[1:2])
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 4, 29, 36, 46)], ids=name)
def test_parts_of_the_windows(case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of all windows at once, of a sample at a time, and of lines of one."""
    (x, weight, bias), arguments = tensors(*case, BF16)
    call = torch.ops.aten.convolution.default
    with fxpass.batch_invariant_mode():
        wanted = call(x, weight, bias, *arguments)
        for size in (10_000, 2_000, 1):
            monkeypatch.setattr(convolve, "_BLOCK_BYTES", size)
            assert torch.equal(call(x, weight, bias, *arguments), wanted)


def test_what_calls_it() -> None:
    x, weight = torch.randn(2, 6, 9), torch.randn(4, 6, 3)
    calls = {
        "same": lambda: F.conv1d(x, weight, padding="same"),
        "one sample": lambda: F.conv1d(x[0], weight),
        "layer": lambda: torch.nn.Conv2d(
            6, 4, (3, 1), padding_mode="circular", padding=(1, 0)
        ).eval()(x.unsqueeze(-1)),
        "transposed": lambda: F.conv_transpose1d(x, weight.transpose(0, 1), stride=2),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        wanted = call()
        torch.manual_seed(0)
        with torch.no_grad(), fxpass.batch_invariant_mode(), Recorder() as found:
            torch.testing.assert_close(call(), wanted, rtol=1e-4, atol=1e-4)
        assert not found.unknown, name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_rows_of_the_input_s_gradient(transposed: bool, groups: int) -> None:
    (x, weight, bias), arguments = tensors(
        2, transposed, groups, "strided and dilated", F32, samples=16
    )

    def gradient(count: int) -> torch.Tensor:
        given = x[:count].clone().requires_grad_()
        made = torch.ops.aten.convolution(given, weight, bias, *arguments)
        return torch.autograd.grad(made, given, made.detach().cos())[0]

    wanted = gradient(16)
    with fxpass.batch_invariant_mode(), Recorder() as found:
        whole = gradient(16)
        for count in (1, 3):
            assert torch.equal(gradient(count), whole[:count])
    assert not found.unknown
    assert whole.stride() == wanted.stride()
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)


def test_images_of_one_channel_and_of_one_element() -> None:
    """Strides of dims of one element decide what the next layer calls channels innermost."""
    x = torch.randn(2, 3, 8, 8)
    nets = [
        torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Conv2d(1, 8, 3)),
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), torch.nn.ConvTranspose2d(4, 6, 4)),
    ]
    for net in nets:
        with torch.no_grad():
            wanted = net(x).view(2, -1)
            with fxpass.batch_invariant_mode():
                torch.testing.assert_close(net(x).view(2, -1), wanted, rtol=1e-4, atol=1e-4)


def test_filters_of_each_sample() -> None:
    """A batch in the place of groups, as vmap makes it."""
    for channels in (1, 8):
        x, weight = torch.randn(4, channels, 9, 9), torch.randn(4, 6, channels, 3, 3)
        each = torch.func.vmap(lambda a, b: F.conv2d(a[None], b)[0])
        with fxpass.batch_invariant_mode():
            whole = each(x, weight)
            assert torch.equal(each(x[:1], weight[:1]), whole[:1])
            assert torch.equal(F.conv2d(x[2:3], weight[2]), whole[2:3])


def test_no_samples_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    weight = torch.randn(4, 3, 3, 3)
    options = {"batch_invariant": True, "strict": True}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        call = torch.compile(
            lambda x: F.conv2d(x[x[:, 0, 0, 0] > 0], weight),
            backend=fxpass.rmsnorm_backend, fullgraph=True, options=options,
        )  # fmt: skip
        x = torch.rand(2, 3, 8, 8)
        assert call(-x).shape == (0, 4, 6, 6)
        with fxpass.batch_invariant_mode():
            assert torch.equal(call(x), F.conv2d(x, weight))


def test_gradients() -> None:
    (x, weight, bias), arguments = tensors(2, False, 2, "strided and dilated", F32)
    given = [t.requires_grad_() for t in (x, weight, bias)]

    def gradients():
        return torch.autograd.grad(
            torch.ops.aten.convolution(*given, *arguments).sin().sum(), given
        )

    wanted = gradients()
    with fxpass.batch_invariant_mode():
        found = gradients()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_compiled(layout: str) -> None:
    """Strides as torch gives them, eager mode's bits, and a gradient."""
    (x, weight, bias), arguments = tensors(2, False, 1, "same size", F32)
    x = laid_out(x, layout)
    torch._dynamo.reset()
    fxpass.reset_report()
    options = {"batch_invariant": True, "strict": True}
    call = torch.compile(
        lambda x, w: torch.ops.aten.convolution(x, w, bias, *arguments),
        backend=fxpass.rmsnorm_backend, options=options,
    )  # fmt: skip
    with torch.no_grad():
        found = call(x, weight)
        assert fxpass.last_report().invariant == {"fxpass.bi_convolution": 1}
        assert found.stride() == torch.ops.aten.convolution(x, weight, bias, *arguments).stride()
        with fxpass.batch_invariant_mode():
            wanted = torch.ops.aten.convolution(x, weight, bias, *arguments)
        assert torch.equal(found, wanted)
    weight.requires_grad_()
    (found,) = torch.autograd.grad(call(x, weight).sin().sum(), weight)
    plain = torch.ops.aten.convolution(x, weight, bias, *arguments)
    (wanted,) = torch.autograd.grad(plain.sin().sum(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
