"""Machine code of GPU kernels on disk: built once, whole or rebuilt, never in the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fxpass.kernels import build_cache, cuda_build
from fxpass.kernels.build_cache import BuildError, Once

SOURCE = 'extern "C" __global__ void k(float* p) { p[threadIdx.x] += 1.0f; }'
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """An empty cache, and no memory of earlier builds."""
    try:
        cuda_build.nvrtc()
    except BuildError as error:
        pytest.skip(str(error))
    build_cache.override(tmp_path / "cache")
    cuda_build.reset()
    yield tmp_path / "cache"
    build_cache.override(None)
    cuda_build.reset()


def kept(cache: Path) -> Path:
    (path,) = cache.iterdir()  # nothing of a build is left beside it
    return path


def no_more_builds(monkeypatch) -> None:
    cuda_build.reset()
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: pytest.fail("compiled again"))


def test_second_process_does_not_compile(cache, monkeypatch):
    made = cuda_build.cubin(SOURCE, HOPPER)
    no_more_builds(monkeypatch)
    assert cuda_build.cubin(SOURCE, HOPPER) == made
    assert build_cache.unsealed(kept(cache)) == made


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "of another kernel"])
def test_damaged_file_is_rebuilt(cache, damage):
    made = cuda_build.cubin(SOURCE, HOPPER)
    path = kept(cache)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "changed": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
            "of another kernel": made,  # without the digest behind it
        }[damage]
    )
    cuda_build.reset()
    assert cuda_build.cubin(SOURCE, HOPPER) == made
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_cache_dir_without_access(tmp_path, kind):
    blocked = tmp_path / "blocked"
    if kind == "a file":
        blocked.write_text("")
    else:
        blocked = Path("/proc/fxpass")  # nobody may create this, root included
    build_cache.override(blocked)
    assert cuda_build.cubin(SOURCE, HOPPER).startswith(b"\x7fELF")


def test_everything_that_shapes_the_code_is_in_its_name(cache, monkeypatch):
    cuda_build.cubin(SOURCE, HOPPER)
    cuda_build.cubin(SOURCE, (8, 0))
    cuda_build.cubin(SOURCE + "\n", HOPPER)
    monkeypatch.setattr(cuda_build, "_FLAGS", cuda_build._FLAGS[1:])
    cuda_build.cubin(SOURCE, HOPPER)
    monkeypatch.setattr(cuda_build, "_version", lambda library: (99, 9))
    cuda_build.cubin(SOURCE, HOPPER)
    assert len(list(cache.iterdir())) == 5


def test_threads_share_one_build(monkeypatch):
    real, compiled, made = cuda_build._compile, [], []
    monkeypatch.setattr(
        cuda_build, "_compile", lambda *given: compiled.append(given) or real(*given)
    )
    threads = [
        threading.Thread(target=lambda: made.append(cuda_build.cubin(SOURCE, HOPPER)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert made == made[:1] * 4


def test_a_faulty_source_is_one_line_and_tried_once(cache, monkeypatch):
    with pytest.raises(BuildError, match=r"^NVRTC for sm_90: fxpass.cu\(1\): error: .*$") as error:
        cuda_build.cubin("this is not C++", HOPPER)
    assert "\n" not in str(error.value)
    assert not cache.exists()
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: pytest.fail("compiled again"))
    with pytest.raises(BuildError, match="sm_90"):
        cuda_build.cubin("this is not C++", HOPPER)


def test_a_gpu_nvrtc_does_not_know_is_one_line():
    with pytest.raises(BuildError, match=r"^NVRTC for sm_77: ") as error:
        cuda_build.cubin(SOURCE, (7, 7))
    assert "\n" not in str(error.value)


@pytest.fixture
def packages(monkeypatch, tmp_path) -> dict[str, str]:
    """An environment with two NVRTCs, by major version."""
    found = {}
    for folder, version in (("cu13", "13"), ("cuda_nvrtc", "12")):
        libraries = tmp_path / "nvidia" / folder / "lib"
        libraries.mkdir(parents=True)
        found[version] = str(libraries / f"libnvrtc.so.{version}")
        for name in (f"libnvrtc.so.{version}", f"libnvrtc-builtins.so.{version}.0"):
            (libraries / name).write_text("")
    monkeypatch.setattr(cuda_build.sys, "path", [str(tmp_path)])
    return found


@pytest.mark.parametrize(("cuda", "first"), [("12.8", "12"), ("13.0", "13"), (None, "13")])
def test_nvrtc_of_torchs_cuda_version_comes_first(packages, monkeypatch, cuda, first):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = cuda_build._candidates()
    assert found[0] == packages[first]
    assert sorted(found) == sorted([*packages.values(), *cuda_build._NAMES])


def test_an_interrupted_build_is_tried_again():
    once: Once[int] = Once()

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once.get("key", interrupted)
    assert once.get("key", lambda: 1) == 1
    assert once.get("key", lambda: 2) == 1
