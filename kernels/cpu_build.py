"""Compiles generated C++ with the system compiler, caches the result on disk, and loads it.

How files are kept and shared between processes: `build_cache`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fxpass.kernels import build_cache
from fxpass.kernels.build_cache import BuildError, Once, cache_dir, private_dir, sealed, unsealed

T = TypeVar("T")

_FLAGS = "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -w".split()
# One IEEE operation per operator: bits must not depend on what the machine can fuse. The other
# two only give up errno and floating-point traps, and let the loops vectorise.
_FLAGS += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
_NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that ran."""

    command: tuple[str, ...]
    version: str


_paths: Once[Path] = Once()
_compilers: Once[Compiler] = Once()
_working_flags: list[list[str]] = []


def set_cache_dir(path: str | os.PathLike[str] | None) -> None:
    """Keep built kernels in `path`; None goes back to `$XDG_CACHE_HOME/fxpass`."""
    build_cache.override(path)
    reset()


def reset() -> None:
    """Forget compilers, paths and failures (files on disk stay)."""
    _paths.clear()
    _compilers.clear()
    _working_flags.clear()


def build(name: str, source: str, *, python: bool = False) -> Path:
    """Path of the shared library made from `source`. Raises BuildError.

    `python` gives the source Python.h instead of OpenMP.
    """
    found = compiler()
    key = _key(found, source, python)
    return _paths.get(key, lambda: _built(found, f"{name}-{key[:32]}", source, python))


def compiler() -> Compiler:
    """The C++ compiler that is used, found once. Raises BuildError if there is none."""
    return _compilers.get("", _find_compiler)


def load_library(name: str, source: str) -> ctypes.CDLL:
    """The library built from `source`, loaded. Raises BuildError."""
    return _loaded(name, source, False, lambda path: ctypes.CDLL(str(path)))


def load_module(name: str, source: str) -> ModuleType:
    """The Python extension module `name` built from `source`. Raises BuildError."""
    return _loaded(name, source, True, lambda path: _import(name, path))


def _loaded(name: str, source: str, python: bool, load: Callable[[Path], T]) -> T:
    try:
        return load(build(name, source, python=python))
    except (OSError, ImportError) as error:
        first = error
    # A cache on a file system mounted noexec, or a file damaged since it was checked.
    found = compiler()
    try:
        path = private_dir() / f"{name}-{_key(found, source, python)[:32]}.so"
        _compile(found, source, path, python)
        return load(path)
    except (OSError, ImportError):
        raise BuildError(f"cannot load the built kernel: {_first_line(str(first))}") from first


def _import(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# ---- The cache ------------------------------------------------------------------------------


def _key(compiler: Compiler, source: str, python: bool) -> str:
    abi = sysconfig.get_config_var("SOABI") if python else ""
    parts = (source, *compiler.command, compiler.version, *_FLAGS, _cpu(), str(abi))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _built(compiler: Compiler, stem: str, source: str, python: bool) -> Path:
    cached = cache_dir() / f"{stem}.so"
    if unsealed(cached) is not None:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, cached, python)
        return cached
    except OSError:  # not writable: build for this process alone
        private = private_dir() / cached.name
        _compile(compiler, source, private, python)
        return private


@cache
def _cpu() -> str:
    """What -march=native depends on: a cache may be shared between machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))])


# ---- The compiler ---------------------------------------------------------------------------


def _find_compiler() -> Compiler:
    """The first of $CXX, c++, g++, clang++ that runs. Raises BuildError."""
    tried = []
    for text in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        command = shlex.split(text) if text else []
        if not command:
            continue
        tried.append(text)
        path = shutil.which(command[0])
        if path is None:
            continue
        version = _run([path, *command[1:], "--version"])
        if version.returncode == 0:
            return Compiler((path, *command[1:]), version.stdout)
    raise BuildError(f"no C++ compiler: tried {', '.join(map(str, tried))}; set CXX or install g++")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `command`; a compiler that hangs or cannot start counts as one that failed."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _compile(compiler: Compiler, source: str, target: Path, python: bool) -> None:
    """Compile `source` and move the result to `target`. Raises BuildError, or OSError."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        text, made = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
        text.write_text(source)
        _try_flags(compiler, [str(text), "-o", str(made)], python)
        body = made.read_bytes()
        made.write_bytes(sealed(body))
        os.replace(made, target)


def _try_flags(compiler: Compiler, files: list[str], python: bool) -> None:
    """Compile with the fastest flags that the compiler takes; OpenMP and -march may be refused."""
    failed = None
    for extra in _candidate_flags(python):
        done = _run([*compiler.command, *_FLAGS, *extra, *files])
        if done.returncode == 0:
            if not python and extra not in _working_flags:
                _working_flags.insert(0, extra)
            return
        failed = done
    assert failed is not None
    reason = _first_error(failed.stderr) or f"exit status {failed.returncode}"
    raise BuildError(
        f"{compiler.command[0]} failed: {reason}; "
        "needs a C++17 compiler (g++ 11 or clang++ 14): set CXX"
    )


def _candidate_flags(python: bool) -> list[list[str]]:
    if python:
        return [[f"-I{sysconfig.get_paths()['include']}"]]
    if _working_flags:
        return _working_flags[:1]
    return [[*native, *openmp] for openmp in (["-fopenmp"], []) for native in _NATIVE]


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[0]


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "unknown error"
