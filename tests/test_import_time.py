"""`import fxpass` costs little more than `import torch`: nothing heavy comes along."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "transformers",
    "diffusers",
    "accelerate",
    "numpy",
    "tabulate",
    "torch._inductor",
    "torch._dynamo",
    "torch._functorch",
    "torch.fx.experimental.symbolic_shapes",
)


@functools.cache
def _modules_after(statement: str) -> frozenset[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


def _brought_along() -> frozenset[str]:
    return _modules_after("import fxpass") - _modules_after("import torch")


@pytest.mark.parametrize("heavy", HEAVY)
def test_heavy_module_stays_out(heavy: str) -> None:
    extra = sorted(n for n in _brought_along() if n == heavy or n.startswith(heavy + "."))
    assert not extra, f"import fxpass also imports {extra}; import it where it is used"


def test_nothing_from_outside_comes_along() -> None:
    known = {"fxpass", "torch", *sys.stdlib_module_names}
    names = {name.partition(".")[0] for name in _brought_along()}
    outside = sorted(name for name in names - known if not name.startswith("__editable__"))
    assert not outside, f"import fxpass also imports {outside}"
