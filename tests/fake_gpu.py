"""What Inductor generates for a GPU, on a machine without one: fake tensors, a described device."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

_H200 = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}
_PROPERTIES = DeviceProperties(type="cuda", index=0, cc=90, max_threads_per_block=1024, **_H200)


def captured(
    function: Callable[..., Any], inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The ATen graph of a function over fake CUDA tensors, and the tensors."""
    with FakeTensorMode(), torch.no_grad():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        return make_fx(function, select_decomp_table())(*tensors), tensors


def generated(graph_module: fx.GraphModule, inputs: list[Any]) -> str:
    """The Python text Inductor generates for a graph over fake CUDA tensors, without comments."""
    with _described(), V.set_fake_mode(inputs[0].fake_mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(graph_module, example_inputs=inputs, shape_env=None)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    lines = str(getattr(code, "value", code)).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def ptx(text: str, folder: pathlib.Path, capability: int) -> str:
    """The PTX of the Triton kernels in what `generated` returned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = []
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", text, re.DOTALL)
    for name, source in kernels:
        imports, _, rest = source.partition("@triton_heuristics")
        meta, _, body = rest.partition("@triton.jit")
        path = folder / f"{name}.py"
        imports = imports.replace("triton_helpers.set_driver_to_gpu()", "")
        path.write_text(f"{imports}\n@triton.jit{body}")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = re.search(r"'signature': (\{.*?\})", meta)
        assert found is not None
        signature = ast.literal_eval(found[1])
        sizes = {
            key: 8 if key == "XBLOCK" else 512 for key in signature if signature[key] == "constexpr"
        }
        aligned = {
            (at,): [["tt.divisibility", 16]] for at, key in enumerate(signature) if "ptr" in key
        }
        compiled = triton.compile(
            ASTSource(getattr(module, name), signature, sizes, aligned),
            target=GPUTarget("cuda", capability, 32),
        )
        made.append(compiled.asm["ptx"])
    return "\n".join(made)


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """An H200 as far as code generation asks; nothing can run on it."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = types.SimpleNamespace(
        **_H200, minor=0, name="H200", gcnArchName="", total_memory=140 << 30,
        L2_cache_size=50 << 20, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cuda"),
    )
    active = driver._active
    driver.set_active(target)
    try:
        with (
            mock.patch.object(DeviceProperties, "create", return_value=_PROPERTIES),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
            torch._inductor.config.patch({"triton.autotune_at_compile_time": False}),
            torch._inductor.config.patch(compile_threads=1),
        ):
            yield
    finally:
        driver._active = active
