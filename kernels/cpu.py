"""Placeholder until the C++ row kernel lands; see kernels/reference.py for the meaning."""

from __future__ import annotations

import dataclasses

from fxpass.kernels import reference
from fxpass.kernels.contract import Kernel

KERNEL = Kernel(
    "cpu.row", dataclasses.replace(reference.CONTRACT, platforms=("cpu",)), reference.launch
)
