"""Where built kernels are kept, and what every builder needs around it.

A cached file is named after everything that shaped it and ends in a digest of its own bytes, so a
file cut short is rebuilt instead of loaded. Files appear by `os.replace`: any number of processes
may build the same kernel at once. Failures are remembered, one line each, and not retried.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from fxpass.options import cache_dir_override

T = TypeVar("T")

_TRAILER = b"fxpass-sha256:"

_override: Path | None = None


class BuildError(Exception):
    """No kernel, and why, in one line."""


class Once(Generic[T]):
    """Makes each value once, whichever thread asks first; a BuildError is remembered too."""

    def __init__(self) -> None:
        self._made: dict[Any, Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`; the other threads wait while one of them makes it."""
        with self._lock:
            future = self._made.get(key)
            if mine := future is None:
                future = self._made[key] = Future()
        assert future is not None
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, BuildError):  # an interrupt is no reason to give up
                    self._made.pop(key, None)
        return future.result()

    def clear(self) -> None:
        """Forget everything, failures included."""
        with self._lock:
            self._made.clear()


def override(path: str | os.PathLike[str] | None) -> None:
    """Keep built kernels in `path`; None goes back to `$XDG_CACHE_HOME/fxpass`."""
    global _override
    _override = None if path is None else Path(path)


def cache_dir() -> Path:
    """Where built kernels are kept. The directory need not exist, or be writable."""
    chosen = _override or cache_dir_override()
    if chosen is not None:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fxpass"


@cache
def private_dir() -> Path:
    """A directory of this process alone, for when the cache is not writable."""
    path = Path(tempfile.mkdtemp(prefix="fxpass-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def sealed(body: bytes) -> bytes:
    """`body` with its digest behind it; ELF loaders ignore what follows the file."""
    return body + _TRAILER + hashlib.sha256(body).digest()


def unsealed(path: Path) -> bytes | None:
    """The body of a sealed file, or None if the file is missing or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body, mark, digest = data.rpartition(_TRAILER)
    return body if mark and hashlib.sha256(body).digest() == digest else None


def keep(path: Path, body: bytes) -> None:
    """Write `body`, sealed, in one step. Raises OSError if the directory is not writable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        made = Path(scratch) / path.name
        made.write_bytes(sealed(body))
        os.replace(made, path)
