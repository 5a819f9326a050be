"""Names of operators, and the user's line that is running one."""

from __future__ import annotations

import linecache
import os
import sys
from typing import Any

import torch

from fxpass.dtypes import SHORT_NAMES

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def here() -> tuple[str, str]:
    """(`file:line`, text) of the innermost frame that is neither torch's, Python's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        library = file.startswith(_PYTHON) and "site-packages" not in file
        if not library and not file.startswith((_TORCH, _HERE, "<")):
            line = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno}", line
        frame = frame.f_back  # type: ignore[assignment]
    return "?", ""


def name_of(operator: Any) -> str:
    """`aten.addmm` for an overload of any namespace; the plain name of anything else."""
    packet = getattr(operator, "overloadpacket", None)
    if packet is not None:
        return str(packet)
    if isinstance(operator, str):
        return operator
    module = str(getattr(operator, "__module__", "") or "")
    name = str(getattr(operator, "__name__", operator))
    return name if "." in name or not module.startswith("torch.nn") else f"{module}.{name}"


def kinds(values: Any) -> list[str]:
    """`bf16[2,8,64]` for each tensor of a nested value."""
    from fxpass import torch_private

    return [kind(v) for v in torch_private.leaves(values) if isinstance(v, torch.Tensor)]


def kind(value: torch.Tensor) -> str:
    """`bf16[2,8,64]`."""
    short = SHORT_NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{short}[{','.join(map(str, value.shape))}]"
