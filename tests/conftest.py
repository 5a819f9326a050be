"""The golden fixture, the hypothesis profiles, and skips that say why."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# In CI the same examples run every time; at a desk every run tries new ones.
hypothesis.settings.register_profile("desk", deadline=None)
hypothesis.settings.register_profile(
    "automated", deadline=None, derandomize=True, print_blob=True, database=None
)
hypothesis.settings.load_profile("automated" if os.environ.get("CI") else "desk")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write golden files and README tables instead of comparing with them",
    )
    parser.addoption(
        "--screenshots",
        default=str(GOLDEN.parent.parent / "build" / "screenshots"),
        help="folder for the screenshots of the HTML page, which a browser takes",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def own_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's cache starts empty: the pass does not run on a graph found in it.

    Tests of what the pass reports, or of the code Inductor wrote, failed on a second run.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(tmp_path_factory.mktemp("inductor"))
    yield
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares text with tests/golden/<test file>/<test name>.txt.

    `pytest --update-golden` writes the file; a second text in one test takes a `part` name.
    """
    update = bool(request.config.getoption("--update-golden"))
    folder = GOLDEN / Path(request.node.path).stem

    def check(text: str, part: str = "") -> None:
        path = folder / f"{_file_name(request.node.name, part)}.txt"
        found = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found)
            return
        _compare(path, found)

    return check


def _file_name(test: str, part: str) -> str:
    """`test_x[llama]` as `test_x-llama`: only characters every file system takes."""
    name = re.sub(r"[^\w.+-]+", "-", f"{test} {part}").strip("-")
    return name.removeprefix("test_")


def _compare(path: Path, found: str) -> None:
    place = path.relative_to(GOLDEN.parent.parent)
    if not path.exists():
        pytest.fail(f"{place} is missing; run with --update-golden and commit it", pytrace=False)
    expected = path.read_text()
    if found != expected:
        diff = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(place), "this run", lineterm="", n=2
        )
        message = "differs from the golden file; if that is intended, run with --update-golden"
        pytest.fail("\n".join([message, *diff]), pytrace=False)
