"""The C++ libraries of the CPU's products and reductions, one per element type."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from fxpass.dtypes import short, wide
from fxpass.kernels import cpu_build, cpu_source
from fxpass.kernels.build_cache import BuildError, Once

Run = Callable[[bytes], None]
"""Takes the C struct of a call; its members are all 64 bits wide, so nothing is padded."""

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
HEADERS = {
    "product": ("mm_cpu.h", "mm_cpu_blocks.h"),
    "rows": ("cpu_exp.h", "reduce_cpu.h"),
    "scores": ("cpu_exp.h", "attention_cpu.h"),
}
"""Name of a library -> what it is made of."""
_PARALLEL = 32_768  # elements below which one thread is faster
_MULTIPLICATIONS = 16  # take the time of one element

_runs: Once[Run | None] = Once()
_known: dict[tuple[str, torch.dtype], Run] = {}  # what _runs holds, without its lock


def threads(elements: int, multiplications: int = 0) -> int:
    """Threads for work on so many elements, or so many multiply-adds."""
    work = elements + multiplications // _MULTIPLICATIONS
    return torch.get_num_threads() if work >= _PARALLEL else 1


def library(name: str, element: torch.dtype) -> Run | None:
    """The function `fxpass_<name>`, a row of HEADERS, for `element`.

    None, after one warning, where it cannot be built.
    """
    key = name, element
    known = _known.get(key)
    if known is None:
        known = _runs.get(key, lambda: _built_or_warned(name, element))
        if known is not None:
            _known[key] = known
    return known


def build_all(elements: Iterable[torch.dtype]) -> None:
    """Build every library of `elements` side by side: 5 s for one alone, kept on disk."""
    wanted = {(name, e if name != "scores" else wide(e)) for name in HEADERS for e in elements}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: library(*pair), wanted))


def source(name: str, element: torch.dtype) -> str:
    """The translation unit of a library."""
    common, _, _ = cpu_source.header("cpu_row.h").partition("// ---- One row")
    parts = [
        cpu_source.header("cpu_args.h"),
        common,
        f"#define ELEMENT {short(element)}",
        *(cpu_source.header(f"invariant/{header}") for header in ("cpu_words.h", *HEADERS[name])),
    ]
    return "\n".join(parts)


def loaded(name: str, built: ctypes.CDLL) -> Run:
    """The function of a library."""
    run = getattr(built, f"fxpass_{name}")
    run.argtypes, run.restype = [ctypes.c_char_p], None
    found: Run = run
    return found


def _built_or_warned(name: str, element: torch.dtype) -> Run | None:
    try:
        library = cpu_build.load_library(f"{name}-{short(element)}", source(name, element))
    except BuildError as error:
        warnings.warn(
            f"batch-invariant {name} on the CPU runs through torch, many times slower: {error}",
            stacklevel=5,
        )
        return None
    return loaded(name, library)
