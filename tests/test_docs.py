"""The documents say what is so: tables, links, make targets, names in code blocks."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md")
each_document = pytest.mark.parametrize("document", DOCUMENTS)


def _blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _table(marker: str) -> Callable[[], str]:
    tables = importlib.import_module("fxpass.tables")
    table: Callable[[], str] = getattr(tables, f"{marker}_table")
    return table


@pytest.mark.parametrize("marker", ["kernel", "variant"])
def test_table_is_what_the_package_prints(marker: str, request: pytest.FixtureRequest) -> None:
    """`make golden` writes the tables."""
    begin, end = f"<!-- begin {marker}s -->\n", f"<!-- end {marker}s -->"
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(begin)
    found, after = rest.split(end)
    wanted = _table(marker)().strip("\n") + "\n"
    if request.config.getoption("--update-golden"):
        readme.write_text(f"{before}{begin}{wanted}{end}{after}")
        return
    assert found == wanted, "the README table is out of date; run `make golden`"


@each_document
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE))
    assert named <= targets


@each_document
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


@each_document
def test_files_named_in_text_exist(document: str) -> None:
    """`fxpass/spec.py`, `patterns/`: a path with a folder of this repository in front."""
    folders = "fxpass|kernels|patterns|tests|examples|benchmarks"
    text = (ROOT / document).read_text()
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@each_document
def test_python_blocks_use_names_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    blocks = _blocks(document, "python")
    for block in blocks:
        compile(block, document, "exec")
    dotted = re.findall(r"\bfxpass(?:\.[a-zA-Z_]\w*)+", "\n".join(blocks))
    dotted += re.findall(r"`(fxpass(?:\.[a-zA-Z_]\w*)+)", text)
    missing = sorted({name for name in dotted if not _exists(name)})
    assert not missing, f"{document} uses names that do not exist"


def _exists(name: str) -> bool:
    """True for a module, or for an attribute of one."""
    module, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(module) is None:
        return False
    return (
        hasattr(importlib.import_module(module), attribute)
        or importlib.util.find_spec(name) is not None
    )


def test_options_table_is_complete() -> None:
    options = importlib.import_module("fxpass.options")
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(rows) >= set(options.names())


def test_every_target_has_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    described = re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE)
    assert sorted(phony.split()) == sorted(described)
