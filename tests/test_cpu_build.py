"""Building C++ kernels: many processes, no compiler, damaged files, directories without access."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from kernel_cases import SPECS, inputs

from fxpass.kernels import build_cache, cpu, cpu_build, cpu_call, cpu_source
from fxpass.spec import NormSpec

SPEC = NormSpec.parse(
    "x=f32 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,mul_weight:f32 weight=f32"
)
SCRIPT = """
import sys, torch
from fxpass.kernels import cpu, cpu_build
from fxpass.spec import NormSpec
cpu_build.set_cache_dir(sys.argv[1])
spec = NormSpec.parse(sys.argv[2])
x = torch.arange(64.0).reshape(1, 64)
print(cpu.prepare(spec, 64))
if cpu.prepare(spec, 64) is None:
    print(cpu.launch(spec, x, None, torch.ones(64), None, 1e-6)[0].sum().item())
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """An empty cache in tmp_path, and no memory of earlier builds."""
    monkeypatch.setattr(cpu, "_entries", cpu_build.Once())
    monkeypatch.setattr(cpu, "_by_identity", {})
    cpu_build.set_cache_dir(tmp_path / "cache")
    yield
    cpu_build.set_cache_dir(None)


def result(call=None) -> torch.Tensor:
    x = torch.arange(64.0).reshape(1, 64)
    return (call or cpu.entry(SPEC))(x, None, torch.ones(64), None, 1e-6)


def start(cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(cache), str(SPEC)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def libraries(path: Path) -> list[Path]:
    return sorted(path.glob("row-*.so"))


def test_several_processes_build_at_once(tmp_path):
    processes = [start(tmp_path / "shared") for _ in range(3)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert len({out for out, _ in outputs}) == 1
    assert outputs[0][0].startswith("None\n")
    assert len(libraries(tmp_path / "shared")) == 1
    assert not list((tmp_path / "shared").glob("build-*"))


def test_threads_share_one_build(monkeypatch):
    compiled = []
    real = cpu_build._compile

    def counting(compiler, source, target, python):
        compiled.append(target.name)
        time.sleep(0.05)
        real(compiler, source, target, python)

    monkeypatch.setattr(cpu_build, "_compile", counting)
    threads = [threading.Thread(target=cpu.prepare, args=(SPEC, 64)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([name for name in compiled if name.startswith("row-")]) == 1
    assert cpu.prepare(SPEC, 64) is None


def test_second_process_does_not_compile(tmp_path, monkeypatch):
    wanted = result()
    monkeypatch.setattr(cpu, "_entries", cpu_build.Once())
    cpu_build.reset()
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(result(), wanted)


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed"])
def test_damaged_file_is_rebuilt(tmp_path, damage):
    source = cpu_source.source(SPEC)
    path = cpu_build.build("row", source)
    whole = path.read_bytes()
    path.unlink()
    changed = whole[:2000] + b"\xff" + whole[2001:]
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "changed": changed}[damage]
    )
    cpu_build.reset()
    assert torch.isfinite(result()).all()
    assert build_cache.unsealed(path)


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_cache_dir_without_access(tmp_path, kind):
    if kind == "a file":
        blocked = tmp_path / "blocked"
        blocked.write_text("")
    else:
        blocked = Path("/proc/fxpass")  # nobody may create this, root included
    cpu_build.set_cache_dir(blocked)
    assert torch.isfinite(result()).all()
    assert build_cache.private_dir().parent == Path(tempfile.gettempdir())


def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("PATH", "")
    cpu_build.reset()


def test_no_compiler_refuses_in_one_line(monkeypatch):
    no_compiler(monkeypatch)
    reason = cpu.prepare(SPEC, 64)
    assert reason == (
        "no C++ compiler: tried /nonexistent/c++, c++, g++, clang++; set CXX or install g++"
    )


def test_failure_is_remembered(monkeypatch):
    no_compiler(monkeypatch)
    assert cpu.prepare(SPEC, 64) is not None
    monkeypatch.setattr(cpu_build, "_find_compiler", lambda: pytest.fail("tried again"))
    assert "no C++ compiler" in str(cpu.prepare(SPEC, 64))
    other = NormSpec.parse(str(SPEC).replace(" weight=f32", ""))
    assert "no C++ compiler" in str(cpu.prepare(other, 64))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_compiler_error_is_quoted(monkeypatch, tmp_path):
    broken = script(
        tmp_path / "broken-c++",
        'case "$*" in *--version*) echo broken 1.0; exit 0;; esac\n'
        'echo "note: hello" >&2; echo "kernel.cpp:1: fatal error: no space left" >&2; exit 1',
    )
    monkeypatch.setenv("CXX", str(broken))
    cpu_build.reset()
    reason = cpu.prepare(SPEC, 64)
    assert reason is not None
    assert reason.count("\n") == 0
    assert f"{broken} failed: kernel.cpp:1: fatal error: no space left; needs" in reason


@pytest.mark.parametrize("name", ["llama_f16", "mixed_16bit", "llama", "x_over_sqrt"])
def test_refused_flags_are_left_out(monkeypatch, tmp_path, name):
    spec = NormSpec.parse(SPECS[name])
    given = inputs(spec, 5, 1000)
    wanted = given.run(cpu.KERNEL, spec)["out"]
    picky = script(
        tmp_path / "picky-c++",
        'case "$*" in *-march=native*|*-mcpu=native*|*-fopenmp*) echo "error: flag" >&2; exit 1;;'
        f' esac\nPATH={os.environ["PATH"]} exec c++ "$@"',
    )
    monkeypatch.setenv("CXX", str(picky))
    monkeypatch.setattr(cpu, "_entries", cpu_build.Once())
    monkeypatch.setattr(cpu, "_by_identity", {})
    cpu_build.reset()
    assert torch.equal(given.run(cpu.KERNEL, spec)["out"], wanted)  # narrower registers, same bits
    assert cpu_build._working_flags == [[]]


def test_compiler_is_part_of_the_key(monkeypatch, tmp_path):
    source = cpu_source.source(SPEC)
    first = cpu_build.build("row", source)
    other = script(tmp_path / "c++", f'PATH={os.environ["PATH"]} exec c++ "$@"')
    monkeypatch.setenv("CXX", str(other))
    cpu_build.reset()
    assert cpu_build.build("row", source) != first


def test_ctypes_gives_the_same_bits(monkeypatch):
    fast = cpu.entry(SPEC)
    slow = cpu_call.through_ctypes(SPEC, cpu._load(SPEC))
    x = torch.randn(6, 50, 40)
    weight = torch.randn(40)
    for given in (x, x.transpose(0, 1), x[:, ::3], x[:0], x[0, 0]):
        assert torch.equal(
            fast(given, None, weight, None, 1e-6), slow(given, None, weight, None, 1e-6)
        )
    monkeypatch.setattr(cpu_call, "has_glue", lambda: False)
    monkeypatch.setattr(cpu, "_entries", cpu_build.Once())
    assert type(cpu.entry(SPEC)) is type(slow)
    assert torch.equal(result(), result(fast))


def test_threads_come_from_torch_own_openmp():
    result()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(runtimes) <= 1, runtimes


def test_cache_dir_follows_xdg(monkeypatch, tmp_path):
    cpu_build.set_cache_dir(None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_build.cache_dir() == tmp_path / "fxpass"
