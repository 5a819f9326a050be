"""The ATen overloads the mode replaces: one table for eager mode, compiled mode and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from fxpass.invariant import (
    attention,
    attention_grad,
    attention_op,
    convolutions,
    layouts,
    norms,
    pointwise,
    products,
    recurrent_ops,
    reductions,
    solves,
)
from fxpass.invariant.aten import Operator, aten, in_place, into

_PRODUCTS: dict[str, Operator] = {
    "mm": products.mm,
    "mm.out": into(products.mm),
    "mm.dtype": products.mm_dtype,
    "mm.dtype_out": into(products.mm_dtype),
    "bmm": products.bmm,
    "bmm.out": into(products.bmm),
    "bmm.dtype": products.bmm_dtype,
    "bmm.dtype_out": into(products.bmm_dtype),
    "addmm": products.addmm,
    "addmm_": in_place(products.addmm),
    "addmm.out": into(products.addmm),
    "addmm.dtype": products.addmm_dtype,
    "addmm.dtype_out": into(products.addmm_dtype),
    "baddbmm": products.baddbmm,
    "baddbmm_": in_place(products.baddbmm),
    "baddbmm.out": into(products.baddbmm),
    "baddbmm.dtype": products.baddbmm_dtype,
    "baddbmm.dtype_out": into(products.baddbmm_dtype),
    "addbmm": products.addbmm,
    "addbmm_": in_place(products.addbmm),
    "addbmm.out": into(products.addbmm),
    "mv": products.mv,
    "mv.out": into(products.mv),
    "addmv": products.addmv,
    "addmv_": in_place(products.addmv),
    "addmv.out": into(products.addmv),
    "dot": products.dot,
    "vdot": products.dot,
    "_grouped_mm": products.grouped_mm,
    "_addmm_activation": products.addmm_activation,
    "_addmm_activation.out": into(products.addmm_activation),
}

_SOLVES: dict[str, Operator] = {
    "linalg_solve_triangular": solves.solve_triangular,
    "linalg_solve_triangular.out": into(solves.solve_triangular),
}

_CONVOLUTIONS: dict[str, Operator] = {
    "convolution": convolutions.convolution,
    "convolution.out": into(convolutions.convolution),
    "convolution_backward": convolutions.convolution_backward,
}

_LAYOUTS: dict[str, Operator] = {
    "native_batch_norm": layouts.batch_norm,
    "cudnn_batch_norm": partial(layouts.vendor_batch_norm, 4),
    "miopen_batch_norm": partial(layouts.vendor_batch_norm, 3),
    "_weight_norm_interface": layouts.weight_norm,
}
for _name in ("upsample_bilinear2d", "upsample_trilinear3d", "_adaptive_avg_pool2d"):
    _function = layouts.contiguous_first(getattr(aten, _name).default)
    _LAYOUTS |= {_name: _function, f"{_name}.out": into(_function)}

_REDUCTIONS: dict[str, Operator] = {
    "sum": reductions.sum_all,
    "sum.dim_IntList": reductions.sum_dims,
    "sum.IntList_out": into(reductions.sum_dims, out_gives_dtype=True),
    "nansum": reductions.nansum,
    "nansum.out": into(reductions.nansum, out_gives_dtype=True),
    "mean": reductions.mean_all,
    "mean.dim": reductions.mean_dims,
    "mean.out": into(reductions.mean_dims, out_gives_dtype=True),
    "linalg_vector_norm": reductions.vector_norm,
    "linalg_vector_norm.out": into(reductions.vector_norm),
    "norm.Scalar": reductions.norm,
    "norm.ScalarOpt_dim": reductions.norm,
    "norm.ScalarOpt_dtype": reductions.norm,
    "norm.ScalarOpt_dim_dtype": reductions.norm,
    "norm.out": into(reductions.norm),
    "norm.dtype_out": into(reductions.norm),
    "logsumexp": reductions.logsumexp,
    "logsumexp.out": into(reductions.logsumexp),
    "_softmax": reductions.softmax,
    "_softmax.out": into(reductions.softmax),
    "_log_softmax": reductions.log_softmax,
    "_log_softmax.out": into(reductions.log_softmax),
    "cumsum": reductions.cumsum,
    "cumsum_": in_place(reductions.cumsum),
    "cumsum.out": into(reductions.cumsum, out_gives_dtype=True),
    "var.correction": reductions.var,
    "var.correction_out": into(reductions.var),
    "std.correction": reductions.std,
    "std.correction_out": into(reductions.std),
    "var_mean.correction": reductions.var_mean,
    "std_mean.correction": reductions.std_mean,
}

_NORMS: dict[str, Operator] = {
    "native_layer_norm": norms.layer_norm,
    "_fused_rms_norm": norms.fused_rms_norm,
    "native_group_norm": norms.group_norm,
}

_ATTENTION: dict[str, Operator] = {
    "_scaled_dot_product_flash_attention_for_cpu": attention.flash_for_cpu,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_grad.flash_for_cpu_backward,
    "_scaled_dot_product_efficient_attention": attention.efficient,
    "_scaled_dot_product_flash_attention": attention.flash,
    "_scaled_dot_product_cudnn_attention": attention.cudnn,
}

LEAVES = MappingProxyType(
    {
        **_PRODUCTS,
        **_SOLVES,
        **_CONVOLUTIONS,
        **_LAYOUTS,
        **_REDUCTIONS,
        **_NORMS,
        **_ATTENTION,
    }
)
"""Replaced at the CPU and CUDA keys, below autograd. A name is `packet` or `packet.overload`."""

CUSTOM: Mapping[str, Operator] = MappingProxyType(
    {"transformers.grouped_mm_fallback": products.grouped_mm}
)
"""Operators of other libraries that mean what one above does; replaced in compiled graphs.

Their own kernels call ATen's operators, which eager mode replaces and compiled code does not. This
one multiplies the experts of Hugging Face's models where they are not bfloat16."""

COMPOSITES: Mapping[str, Operator] = MappingProxyType(
    {
        "linear": products.linear,
        "matmul": products.matmul,
        "rms_norm": norms.rms_norm,
        "scaled_dot_product_attention": attention_op.scaled_dot_product,
        **recurrent_ops.table(),
    }
)
"""Replaced where torch opens them into other operators, above autograd, because how it opens them
follows strides, the number of rows or the device; differentiable."""

CPU_POINTWISE = MappingProxyType(pointwise.table())
"""Replaced at the CPU key: torch's own bits follow an element's place in memory."""
