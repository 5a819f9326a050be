"""Kernels whose rows do not depend on other rows: products, reductions, attention.

`dispatch` picks the kernel by device; `fxpass.invariant` makes ATen's operators of them.
"""
