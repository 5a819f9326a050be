"""What went wrong with a TARGET, in one line that ends in what to do."""

from __future__ import annotations

import os
import re
import traceback

import torch

from fxpass.errors import FxpassError

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_NO_CUDA = re.compile(
    r"on a CUDA device but torch.cuda.is_available|"
    r"not compiled with CUDA|not linked with support for cuda|No CUDA GPUs|Found no NVIDIA",
    re.I,
)
_TRACED = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_INSIDE = re.compile(r"got (\w+)\(([\"'])(.*?)\2\)", re.DOTALL)


class TargetError(FxpassError):
    """A TARGET cannot be loaded or traced."""


class NoGraphError(TargetError):
    """torch.compile makes no graph of a TARGET."""


def said(error: BaseException, doing: str) -> str:
    """An error of the user's code: what raised, what it says, and the user's own line."""
    place = _place(error)
    if _NO_CUDA.search(str(error)):
        return (
            f"asks for CUDA{place}, and torch {torch.__version__} finds none here;"
            " use --fake, and --platform cuda:sm_90 say, to plan without the GPU"
        )
    return f"{doing} raised {_what(error)}{place}; --traceback shows where"


def said_of_file(error: BaseException) -> str:
    """An error of reading a saved program."""
    if _NO_CUDA.search(str(error)):
        found = f"torch {torch.__version__} finds none here"
        return f"holds tensors on CUDA, and {found}; export the model on the CPU"
    needs = "a file from torch.export.save (an AOTInductor package has no graph)"
    return f"cannot be read ({_what(error)}); needs {needs}"


def _what(error: BaseException) -> str:
    """Type and first line; of an error inside Dynamo, the one that it wraps."""
    wrapped = _INSIDE.search(str(error))
    if wrapped:
        return f"{wrapped[1]}: {wrapped[3].splitlines()[0]}"
    lines = str(error).strip().splitlines()
    if lines and lines[0].endswith("raised:"):  # a compiler's error: what it wraps comes next
        return " ".join(lines[1:2]) or type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """The innermost line of the user's, from the text of a Dynamo error or from the traceback."""
    text = str(error).rpartition("from user code:")[2]
    frames = [(file, line) for file, line, _ in _TRACED.findall(text)]
    frames = [frame for frame in frames if _is_users(frame[0])]
    if not frames:
        seen = traceback.extract_tb(error.__traceback__)
        frames = [(f.filename, str(f.lineno)) for f in seen if _is_users(f.filename)]
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""


def _is_users(file: str) -> bool:
    in_library = file.startswith(_PYTHON) and "site-packages" not in file
    return not in_library and not file.startswith((_TORCH, _HERE, "<"))
