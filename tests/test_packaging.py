"""The wheel holds what it should and nothing else, and the folder `kernels` hides nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fxpass", "kernels", "patterns")


def _run(*command: str | Path, cwd: Path, **environment: str | None) -> str:
    """stdout of a command; a variable set to None is removed. Fails with the whole output."""
    env = {key: value for key, value in os.environ.items() if key not in environment}
    env.update({key: value for key, value in environment.items() if value is not None})
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that stale files under build/ cannot get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    _run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("fxpass-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target)
    _run(*pip, wheel, cwd=target)
    return target


def test_installs_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fxpass"}


def test_holds_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {"fxpass": "fxpass", "kernels": "fxpass/kernels", "patterns": "fxpass/patterns"}
    for folder, target in inside.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h"):
                assert f"{target}/{path.relative_to(ROOT / folder)}" in names
    assert "fxpass/py.typed" in names
    assert "fxpass/templates/diff.html.jinja" in names


def test_offers_the_backend_to_torch_compile(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (place,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(place).decode()
    assert "[torch_dynamo_backends]\nrmsnorm = fxpass.backend:rmsnorm_backend" in text


@pytest.mark.parametrize("module", ["fxpass", "fxpass.kernels", "fxpass.patterns"])
def test_installed_copy_imports(installed: Path, tmp_path: Path, module: str) -> None:
    code = f"import {module} as m; print(m.__file__)"
    found = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()).is_relative_to(installed)


TRANSFORMERS = "from transformers import LlamaConfig, LlamaForCausalLM"
DIFFUSERS = "from diffusers.models.normalization import RMSNorm"


@pytest.mark.slow
@pytest.mark.parametrize("safe_path", [None, "1"], ids=["cwd_on_path", "safe_path"])
@pytest.mark.parametrize("code", [TRANSFORMERS, DIFFUSERS], ids=["transformers", "diffusers"])
def test_models_import_from_the_repository_root(code: str, safe_path: str | None) -> None:
    """Without PYTHONSAFEPATH `import kernels` finds our folder; it must stand aside.

    transformers takes a module without __file__ and __version__ for "not installed".
    """
    pytest.importorskip(code.split()[1].partition(".")[0])
    _run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH=safe_path)


def test_folder_lets_an_installed_kernels_package_pass(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.layer import Mode\n")
    (package / "layer.py").write_text("Mode = 'the real one'\n")
    code = "from kernels import Mode; import kernels.layer; print(Mode, kernels.__file__)"
    found = _run(
        sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH=None, PYTHONPATH=str(tmp_path)
    )
    assert found.split() == ["the", "real", "one", str(package / "__init__.py")]


def test_folder_is_not_importable_as_kernels() -> None:
    code = (
        "import kernels\n"
        "assert not hasattr(kernels, 'register')\n"
        "assert getattr(kernels, '__file__', None) is None"
    )
    _run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH=None)
