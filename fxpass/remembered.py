"""Reports kept next to Inductor's cache, for compiles that the cache answers.

A graph found in Inductor's caches does not pass through the pass again, so its report would be
empty. What the pass said when the graph was first compiled is kept under the same roof.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpass import facts, torch_private
from fxpass.report import Report


def key_of(graph_module: fx.GraphModule, inputs: Sequence[Any], uuid: str) -> str:
    """Identifies a Dynamo graph with its inputs' shapes, and the pass that will see it."""
    digest = hashlib.sha256(uuid.encode())
    digest.update(graph_module.code.encode())
    for node in graph_module.graph.nodes:
        found = facts.of(node)
        if node.op == "placeholder" and found is not None:
            digest.update(repr((str(found.shape), found.dtype, str(found.stride))).encode())
    for value in inputs:
        if isinstance(value, torch.Tensor):
            digest.update(str(value.requires_grad).encode())
    digest.update(str(torch.is_grad_enabled()).encode())
    return digest.hexdigest()


def keep(key: str, report: Report) -> None:
    """Write a report; a folder that cannot be written loses nothing but the record."""
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(report.to_json())
        os.replace(name, path)


def recall(key: str) -> Report | None:
    """The report kept for this graph, if it can be read."""
    try:
        return Report.from_dict(json.loads(_path(key).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _path(key: str) -> pathlib.Path:
    return pathlib.Path(torch_private.inductor_cache_dir()) / "fxpass" / f"{key}.json"
