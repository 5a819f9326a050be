"""Compiling Triton kernels where there is no GPU, and running interpreted tests elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TARGETS = [
    ("cuda", 80, 32),
    ("cuda", 90, 32),
    ("cuda", 100, 32),
    ("hip", "gfx942", 64),
    ("hip", "gfx950", 64),
]


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    target: tuple[str, Any, int],
    **options: Any,
) -> Any:
    """A jitted kernel for a target. Pointers and the integers in `types` are multiples of 16."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith(("*", "i32"))
    }
    source = ASTSource(kernel, signature, dict(constants), aligned)
    return build(source, target=GPUTarget(*target), options=options)


def assert_machine_code(found: Any, target: tuple[str, Any, int]) -> None:
    """For AMD GPUs a code object of the right architecture; ptxas for NVIDIA ones is not asked."""
    backend, arch, _ = target
    if backend == "hip":
        assert found.asm["hsaco"].startswith(b"\x7fELF")
        assert re.search(rf'amdgcn_target "[^"]*-{arch}"', found.asm["amdgcn"])
    else:
        assert found.asm["ptx"]


def interpreter(file: str) -> Any:
    """A module's fixture: pytest on a file of this folder, in a process that interprets Triton.

    Started before the first test of the module; a test that asks for it waits for the end.
    """

    @pytest.fixture(scope="module", autouse=True, name="interpreter")
    def running():
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file)
        with subprocess.Popen(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as started:
            yield started
            started.kill()

    return running


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """For modules that import it: Triton compiles anew, whatever earlier runs have kept."""
    import triton

    before = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = before
