"""Who may import whom, and who may touch what. One table; a new file needs a row in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = f"{Path(__file__).name}: MODULES"

# Every module, in import order: a module may import those above it, never one below.
# Names are without the leading `fxpass.`; `patterns`, `kernels`, `fxpass` are __init__ files.
MODULES = """
    errors dtypes options spec
    torch_private torch_fakes torch_dispatcher torch_inductor torch_watch facts
    terms calls spellings parts composites lifting formula
    patterns.finish patterns.l2_norm patterns.rms_norm patterns
    meaning elements residual uses sites mutation diagnose matching
    kernels.contract kernels.reference
    kernels.steps kernels.gpu_rows kernels.gpu_contract kernels.gpu_call kernels.inductor
    kernels.build_cache kernels.c_struct
    kernels.cpu_source kernels.cpu_build kernels.cpu_call kernels.cpu
    kernels.cuda_source kernels.cuda_tables kernels.cuda_cluster_tables kernels.cuda_schedule
    kernels.cuda_build
    kernels.cuda_driver
    kernels.cuda_launch kernels.cuda_call
    kernels.cuda_row
    kernels.triton_direct kernels.triton_launch
    kernels.triton_tiles kernels.triton_words kernels.triton_source kernels.triton_call
    kernels.triton_row
    kernels.aiter_api kernels.aiter
    kernels.measured
    kernels.registry kernels
    kernels.invariant kernels.invariant.cpu_library kernels.invariant.mm_plain
    kernels.invariant.mm_cpu kernels.invariant.reduce_plain kernels.invariant.reduce_cpu
    kernels.invariant.attention_cpu
    kernels.invariant.chunks kernels.invariant.mm_triton kernels.invariant.mm_schedule
    kernels.invariant.tensor_map kernels.invariant.mm_launch kernels.invariant.mm_plan
    kernels.invariant.mm_gpu
    kernels.invariant.triton_math
    kernels.invariant.reduce_triton kernels.invariant.scan_triton kernels.invariant.reduce_plan
    kernels.invariant.reduce_gpu
    kernels.invariant.attention_triton kernels.invariant.attention_plan
    kernels.invariant.attention_gpu
    kernels.invariant.convolve kernels.invariant.solve_triton kernels.invariant.solve
    kernels.invariant.dispatch
    platforms fusable layout copies select traffic plan ops
    fused lowering
    verify rewrite sampling html_table report tables remembered modules printing
    diff diff_text diff_svg diff_html diff_view
    pipeline capture ledger artifacts
    invariant invariant.aten invariant.products invariant.recurrent invariant.recurrent_ops
    invariant.solves invariant.convolutions
    invariant.reductions invariant.norms invariant.layouts invariant.add_norm
    invariant.attention invariant.attention_grad invariant.attention_op invariant.pointwise
    invariant.table invariant.mode invariant.library invariant.compiled
    hooks backend
    fxpass
    pytest_plugin
    target_errors target_text target_dump target_hf target
    doctor numerics
    invariant.source invariant.recorder
    invariant.compare invariant.trace invariant.vary invariant.prove
    invariant.prove_eager invariant.prove_compiled
    invariant.families invariant.measured invariant.measure invariant.collectives invariant.audit
    corpus_rows corpus
    cli_common cli_rows cli_baseline cli_explain cli_diff cli_bisect cli_machine cli_corpus
    cli_prove cli_audit
    cli __main__
""".split()

# Narrower than the order. The first entry whose prefix fits decides.
MAY_IMPORT = {
    "kernels": ("errors", "dtypes", "options", "spec", "kernels"),
    "patterns": ("errors", "dtypes", "spec", "terms", "formula", "patterns"),
}

# Which modules (by prefix) may not know a library at all.
MAY_NOT_KNOW = {
    "torch.fx": ("errors", "dtypes", "options", "spec", "patterns", "kernels"),
    "torch": ("errors", "options"),
}

# Names with one owner.
PRIVATE_TORCH: dict[str, set[str] | None] = {
    "torch_private": None,  # anything
    "torch_fakes": None,
    "torch_dispatcher": None,
    "torch_inductor": None,
    "torch_watch": None,
    # Saves 1.5 us a call, has a public fallback, and kernels do not import the pass.
    "kernels.cpu_call": {"torch._C._dynamo.guards._empty_strided_cpu"},
    # What Inductor's own launches use; the public stream object costs 1 us more.
    "kernels.cuda_launch": {
        "torch._C._cuda_getCurrentRawStream",
        "torch._C._cuda_getDevice",
        "torch._C",
        "torch._C._dynamo.guards._empty_strided_cuda",
    },
}
NODE_META = ("facts",)
ENVIRONMENT: dict[str, set[str] | None] = {
    "options": None,
    "kernels.cpu_build": {"CXX"},
    "kernels.build_cache": {"XDG_CACHE_HOME"},
    "diff_text": {"NO_COLOR"},
    "invariant.collectives": None,  # what NCCL reads
}


def _files() -> dict[str, Path]:
    """Module name (without `fxpass.`) -> file."""
    found = {}
    for folder in ("fxpass", "patterns", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts[1:] if parts[0] == "fxpass" and parts[1:] else parts)] = path
    return found


FILES = _files()
TREES = {name: ast.parse(path.read_text(), path.name) for name, path in FILES.items()}
each_module = pytest.mark.parametrize("module", sorted(FILES))


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, lazily or not, names included."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # A name known only at run time is the user's module.
            named = (name.value for name in node.args[:1] if isinstance(name, ast.Constant))
            yield from ((node.lineno, str(name)) for name in named)


def _own_imports(module: str) -> Iterator[tuple[int, str]]:
    """The imports of this project's modules, as names of the table."""
    for line, name in _imports(module):
        if name != "fxpass" and not name.startswith("fxpass."):
            continue
        rest = name.removeprefix("fxpass").removeprefix(".")
        while "." in rest and rest not in FILES:  # `spec.NormSpec` -> `spec`
            rest = rest.rpartition(".")[0]
        yield line, rest if rest in FILES else "fxpass"


def _attributes(module: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def _complain(module: str, faults: list[str]) -> None:
    if faults:
        lines = dict.fromkeys(faults)  # one line once, however many names it imports
        pytest.fail("\n".join([f"{FILES[module].relative_to(ROOT)}:", *lines]), pytrace=False)


@each_module
def test_module_has_a_row(module: str) -> None:
    assert module in MODULES, (
        f"{FILES[module].relative_to(ROOT)} is in no layer; add {module!r} to {HERE}, "
        "below everything it imports"
    )


@each_module
def test_imports_point_upwards(module: str) -> None:
    if module not in MODULES:
        pytest.skip("has no row; test_module_has_a_row says so")
    above = MODULES[: MODULES.index(module)]
    _complain(
        module,
        [
            f"  line {line} imports {name}, which stands below {module} in {HERE}"
            for line, name in _own_imports(module)
            if name not in above
        ],
    )


@each_module
def test_families_stay_apart(module: str) -> None:
    allowed = next((MAY_IMPORT[key] for key in MAY_IMPORT if _within(module, (key,))), None)
    if allowed is None:
        return
    _complain(
        module,
        [
            f"  line {line} imports {name}; allowed: {', '.join(allowed)}"
            for line, name in _own_imports(module)
            if not _within(name, allowed)
        ],
    )


@each_module
@pytest.mark.parametrize("library", MAY_NOT_KNOW)
def test_library_is_unknown(module: str, library: str) -> None:
    if not _within(module, MAY_NOT_KNOW[library]):
        return
    _complain(
        module,
        [
            f"  line {line} uses {name}; {module} must not know {library}"
            for line, name in [*_imports(module), *_attributes(module)]
            if _within(name, (library,))
        ],
    )


@each_module
def test_private_torch_has_one_owner(module: str) -> None:
    allowed = PRIVATE_TORCH.get(module, set())
    if allowed is None:
        return
    _complain(
        module,
        [
            f"  line {line} uses {name}; put it into fxpass/torch_private.py"
            for line, name in [*_imports(module), *_attributes(module)]
            if _is_private_torch(name) and name not in allowed
        ],
    )


def _is_private_torch(name: str) -> bool:
    first, *rest = name.split(".")
    private = [part for part in rest if part.startswith("_") and not part.startswith("__")]
    # An operator such as torch.ops.aten._to_copy is a name of the operator set, not a module.
    return first == "torch" and bool(private) and rest[0] != "ops"


@each_module
def test_node_meta_has_one_reader(module: str) -> None:
    if module in NODE_META:
        return
    written = {
        id(node.value)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
    }
    _complain(
        module,
        [
            f"  line {node.lineno} reads {ast.unparse(node)}; ask fxpass/facts.py"
            for node in ast.walk(TREES[module])
            if isinstance(node, ast.Attribute) and node.attr == "meta"
            if isinstance(node.ctx, ast.Load) and id(node) not in written
        ],
    )


@each_module
def test_environment_has_one_reader(module: str) -> None:
    allowed = ENVIRONMENT.get(module, set())
    if allowed is None:
        return
    read = [(line, name) for line, name in _environment_reads(module) if name not in allowed]
    _complain(
        module,
        [f"  line {line} reads {name} from the environment; see options.py" for line, name in read],
    )


def _environment_reads(module: str) -> Iterator[tuple[int, str]]:
    """(line, variable) of every use of the environment; `everything` if no name is given."""
    tree = TREES[module]
    named: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            target = node.func
            if isinstance(target, ast.Attribute) and target.attr == "get":
                target = target.value
            named[id(target)] = str(node.args[0].value)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            named[id(node.value)] = str(node.slice.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield node.lineno, named.get(id(node), "everything")
    for line, name in _imports(module):
        if name in ("os.environ", "os.getenv"):
            yield line, f"{name} (import os instead)"
