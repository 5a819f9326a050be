"""Kernels that check what the layout planner promises them, and a plan with its results compared.

`FLAT` reads two contiguous dims, `ROWS` two dims with a row stride, `LEADING` two row strides.
"""

from __future__ import annotations

import dataclasses

import torch
from cases_rounding import unit
from helpers import capture, changed, rewritten

from fxpass.kernels import Kernel, Layout, gpu_rows, reference
from fxpass.options import Options


def llama(x, w):
    return w * unit(x).to(w.dtype)


def _launch(spec, x, residual, weight, bias, eps):
    """The reference, after checking what the contract promises it."""
    for tensor in (x, residual):
        assert tensor is None or tensor.dim() == 2
        assert tensor is None or tensor.is_contiguous()
    return reference.launch(spec, x, residual, weight, bias, eps)


def _strided_launch(spec, x, residual, weight, bias, eps):
    for tensor in (x, residual):
        assert tensor is None or tensor.dim() == 2
        assert tensor is None or not tensor.numel() or tensor.stride(-1) == 1
    return reference.launch(spec, x, residual, weight, bias, eps)


def _kernel(name, rows, launch):
    contract = dataclasses.replace(reference.CONTRACT, layout=Layout(rows=rows, rank=2))
    return Kernel(f"testing.{name}", contract, launch)


def _leading_launch(spec, x, residual, weight, bias, eps):
    strides = [tensor.stride() for tensor in (x, residual) if tensor is not None]
    assert not x.numel() or gpu_rows.address(x.shape, strides) is not None
    return reference.launch(spec, x, residual, weight, bias, eps)


def _leading_kernel():
    layout = Layout(rows="any", leading=gpu_rows.LEADING)
    contract = dataclasses.replace(reference.CONTRACT, layout=layout)
    return Kernel("testing.leading", contract, _leading_launch)


KERNELS = (
    _kernel("flat", "contiguous", _launch),
    _kernel("rows", "strided_2d", _strided_launch),
    _leading_kernel(),
)


FLAT = Options(providers=("testing.flat",), strict=True)
ROWS = Options(providers=("testing.rows",), strict=True)
LEADING = Options(providers=("testing.leading",), strict=True)


def planned(function, inputs, options, dynamic=None):
    """(layout nodes per site, bytes per site) at ATen level, results compared."""
    with torch.no_grad():
        level = capture(function, inputs, dynamic=dynamic).graphs("aten")[-1]
    made, report = rewritten(level, options)
    assert report.rewritten, str(report)
    assert not changed(level, options)
    nodes = [list(site.layout_nodes) for site in report.rewritten]
    return made, nodes, [site.bytes_copied for site in report.rewritten]
