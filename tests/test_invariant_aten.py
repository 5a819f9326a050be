"""ATen's operators in the mode mean what torch's do: shapes, dtypes, strides, errors, gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import fxpass
from fxpass.invariant.table import COMPOSITES, LEAVES

aten = torch.ops.aten

REACH_THE_TABLE = frozenset(
    # Their kernels call operators of the table (a test below runs some of them).
    """sum.out mean.dtype_out norm.Scalar_out norm.ScalarOpt_dtype_out dot.out vdot.out
    native_layer_norm.out native_group_norm.out var_mean.correction_out std_mean.correction_out
    _grouped_mm.out var var.dim var.out std std.dim std.out var_mean var_mean.dim std_mean
    std_mean.dim _scaled_dot_product_flash_attention.quantized linear.out matmul.out
    scaled_dot_product_attention.out convolution_backward.out _weight_norm_interface.out
    upsample_bilinear2d.vec upsample_bilinear2d.vec_out upsample_trilinear3d.vec
    upsample_trilinear3d.vec_out""".split()
)
OTHERS = frozenset(
    # By names of dims, of TorchScript's own types, with three results to write, or composites of
    # the above.
    """sum.DimnameList_out sum.dim_DimnameList sum.DimnameList mean.names_dim mean.names_out
    norm.names_ScalarOpt_dim norm.names_ScalarOpt_dim_dtype norm.names_dtype_out norm.names_out
    logsumexp.names logsumexp.names_out cumsum.dimname cumsum.dimname_out cumsum_.dimname
    var.names_dim var.names_out var.correction_names var.correction_names_out std.names_dim
    std.names_out std.correction_names std.correction_names_out var_mean.names_dim
    var_mean.correction_names std_mean.names_dim std_mean.correction_names
    sum.int sum.float sum.complex sum.bool native_batch_norm.out cudnn_batch_norm.out
    miopen_batch_norm.out""".split()
)


def test_no_overload_is_forgotten() -> None:
    """A new torch with a new overload fails here."""
    packets = {name.partition(".")[0] for name in (*LEAVES, *COMPOSITES)}
    registered = set()
    for packet in packets:
        for overload in getattr(getattr(aten, packet, None), "overloads", list)():
            registered.add(packet if overload == "default" else f"{packet}.{overload}")
    assert registered - {*LEAVES, *COMPOSITES} - REACH_THE_TABLE - OTHERS == set()


def both(call):
    """A call's result outside the mode and in it; an error as its type and text."""
    results = []
    for enabled in (False, True):
        with fxpass.batch_invariant_mode(enabled), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch gives many of them only once
            try:
                results.append(call())
            except Exception as error:
                results.append((type(error), str(error)))
    return results


def same(call, tolerance: float = 1e-4) -> None:
    wanted, found = both(call)
    if isinstance(wanted, tuple) and isinstance(wanted[0], type):
        assert found == wanted
        return
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    pairs = zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        assert ours.stride() == theirs.stride() or 1 in ours.shape


X = torch.randn(3, 4, 5)
MATRICES = torch.randn(2, 6, 6)
INTEGERS = torch.arange(60).view(3, 4, 5)

REDUCTIONS = {
    "sum": lambda x, **k: x.sum(**k),
    "mean": lambda x, **k: x.mean(**k),
    "norm": lambda x, **k: torch.linalg.vector_norm(x, 3, **k),
    "nansum": lambda x, **k: x.nansum(**k),
}
DIMS = (None, (), 0, -1, (0, 2), (2, 0), (-1, -3), (0, 0), 5)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_dims_keepdim_and_dtypes(name: str, keepdim: bool, dims) -> None:
    same(lambda: REDUCTIONS[name](X, dim=dims, keepdim=keepdim))
    for source in (X.bfloat16(), X.double(), INTEGERS, INTEGERS > 3, X.to(torch.complex64)):
        same(lambda x=source: REDUCTIONS[name](x, dim=dims, keepdim=keepdim), 2e-2)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            same(lambda x=source, d=dtype: REDUCTIONS[name](x, dim=dims, dtype=d), 5e-2)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for call in (
        torch.sum, torch.mean, torch.std, torch.linalg.vector_norm, lambda x: x.cumsum(0),
        lambda x: F.softmax(x, -1), lambda x: F.log_softmax(x, 0), lambda x: x.logsumexp(-1),
        lambda x: x.sum(-1), lambda x: x.mean(0, keepdim=True), lambda x: x.norm(float("inf")),
    ):  # fmt: skip
        same(lambda call=call: call(x))
    same(lambda: torch.mm(torch.ones(2, 0), torch.ones(0, 3)))
    same(
        lambda: torch.addmm(torch.full((3,), torch.nan), torch.ones(2, 0), torch.ones(0, 3), beta=0)
    )


@pytest.mark.parametrize("dim", [0, 1, -1, 3])
def test_softmax_and_cumsum_along_any_dim(dim: int) -> None:
    for x in (X, X.bfloat16(), X.mT, INTEGERS):
        for dtype in (None, torch.float32):
            same(lambda x=x, d=dtype: F.softmax(x, dim, dtype=d), 2e-2)
            same(lambda x=x, d=dtype: F.log_softmax(x, dim, dtype=d), 2e-2)
            same(lambda x=x, d=dtype: torch.cumsum(x, dim, dtype=d), 5e-2)
    same(lambda: aten._softmax(X.bfloat16(), dim, True))


@pytest.mark.parametrize("correction", [0, 1, 2, 0.5, 4, 60])
def test_variances(correction: float) -> None:
    for call in (torch.var, torch.std, torch.var_mean, torch.std_mean):
        for dims in (1, (0, 2), None):
            same(lambda c=call, d=dims: c(X, d, correction=correction, keepdim=True))
            same(lambda c=call, d=dims: c(X.bfloat16(), d, correction=correction), 2e-2)


def test_products() -> None:
    a, b = MATRICES
    for bias in (torch.randn(6, 6), torch.randn(6), torch.randn(6, 1), torch.tensor(2.0)):
        for alpha, beta in ((1, 1), (2, 0.5), (0, 1), (1.5, 0)):
            same(lambda c=bias, s=(alpha, beta): torch.addmm(c, a, b.t(), alpha=s[0], beta=s[1]))
            same(lambda c=bias, s=(alpha, beta): c.clone().addmm_(a, b, alpha=s[0], beta=s[1]))
            same(
                lambda c=bias, s=(alpha, beta): torch.baddbmm(
                    c, MATRICES, MATRICES.mT, alpha=s[0], beta=s[1]
                )
            )
            same(lambda c=bias, s=(alpha, beta): torch.addbmm(c, MATRICES, MATRICES, alpha=s[0]))
    same(lambda: torch.addmv(b[0], a, b[1], alpha=2, beta=3))
    same(lambda: torch.mv(a, b[0]) + torch.dot(a[0], b[0]) + torch.vdot(a[0], b[1]))
    same(lambda: torch._addmm_activation(b[0], a, b, use_gelu=True))
    for left in (X, X[0], X[0, 0], torch.randn(7, 1, 4, 5)):
        for right in (torch.randn(5, 2), torch.randn(5), torch.randn(3, 5, 2)):
            same(lambda x=left, y=right: torch.matmul(x, y))
    same(lambda: torch.mm(INTEGERS[0], INTEGERS[1].t()))
    for wrong in (lambda: torch.mm(a, X), lambda: torch.mm(a, b.double()), lambda: a @ X):
        same(wrong)


def test_out_variants_resize_and_refuse() -> None:
    a, b = MATRICES
    for call in (
        lambda out: torch.mm(a, b, out=out),
        lambda out: torch.sum(a, 0, out=out),
        lambda out: torch.mean(a, 1, out=out),
        lambda out: torch.cumsum(a, 0, out=out),
        lambda out: torch.logsumexp(a, 0, out=out),
        lambda out: torch.linalg.vector_norm(a, 2, 0, out=out),
        lambda out: torch.var(a, 0, out=out),
        lambda out: torch.softmax(a, 0, out=out),
        lambda out: aten.native_layer_norm.out(
            a, [6], None, None, 1e-5, out0=out, out1=torch.empty(0), out2=torch.empty(0)
        )[0],
    ):
        for dtype in (torch.float32, torch.float64, torch.int64):
            same(lambda call=call, d=dtype: call(torch.empty(0, dtype=d)))
        same(lambda call=call: call(torch.empty(3, 2)))
        out = torch.empty(0)
        with fxpass.batch_invariant_mode():
            assert call(out) is out or call(out).data_ptr() == out.data_ptr()


def test_a_resized_output_warns() -> None:
    with fxpass.batch_invariant_mode(), pytest.warns(UserWarning, match="was resized"):
        assert torch.mm(*MATRICES, out=torch.empty(3, 2)).shape == (6, 6)


def test_layer_and_rms_norms() -> None:
    w, b = torch.randn(4, 5), torch.randn(4, 5)
    for x, weight, bias in ((X, w, b), (X, None, None), (X.bfloat16(), w, b)):
        same(lambda x=x, w=weight, b=bias: aten.native_layer_norm(x, [4, 5], w, b, 1e-5), 2e-2)
        for eps in (None, 1e-5):
            same(lambda x=x, w=weight, e=eps: F.rms_norm(x, (4, 5), w, e), 2e-2)
    same(lambda: F.rms_norm(X.bfloat16() * 1e-2, (5,)), 2e-2)
    same(lambda: F.layer_norm(X, (3,)))
    same(lambda: aten.native_group_norm(X, torch.ones(4), torch.ones(4), 3, 4, 5, 2, 1e-5))


GRADIENTS = {
    "linear": lambda x: F.linear(x, MATRICES[0, :, :5], MATRICES[1, 0]),
    "matmul": lambda x: torch.matmul(x, MATRICES[0, :5]) + torch.matmul(X[0], x.mT).sum(),
    "mm": lambda x: x[0] @ x[1].t(),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, alpha=2),
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 2),
    "sum": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(1),
    "norm": lambda x: x.norm(dim=1),
    "logsumexp": lambda x: x.logsumexp((0, 1)),
    "std": lambda x: x.std(1),
    "cumsum": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x, (4, 5)),
    "rms_norm": lambda x: F.rms_norm(x, (5,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "causal": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "float mask": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], x[0, :, :4]),
    "silu": F.silu,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    x = X.clone().requires_grad_()
    same(lambda: torch.autograd.grad(GRADIENTS[name](x).sin().sum(), x)[0].contiguous(), 1e-3)


def test_experts_products() -> None:
    x, w = torch.randn(9, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    same(lambda: torch._grouped_mm(x, w, offs=ends), 2e-2)
