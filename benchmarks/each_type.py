"""What the coverage scripts share: every model type of a library, in a process of its own.

A type that hangs, eats memory or crashes costs itself alone. Results are one JSON file, written
after every type, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from zoo import dif, dif_special, hf

import fxpass

RESULTS = Path(__file__).resolve().parent / "results"
Probe = Callable[[str, argparse.Namespace], dict[str, Any]]
"""(type, arguments of the command line) -> its record; runs in the type's process."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every coverage script has."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--diffusers", action="store_true", help="diffusers, not transformers")
    parser.add_argument("--only", help="these types, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds per type")
    parser.add_argument("--memory", type=int, default=24, help="GiB of address space per type")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="0/4: the first of four")
    parser.add_argument("--out", type=Path, help="another results file")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def library(args: argparse.Namespace) -> str:
    """The library whose types are asked for."""
    return "diffusers" if args.diffusers else "transformers"


def build(name: str, args: argparse.Namespace, **changes: Any) -> hf.Built:
    """A tiny random model of a type, with inputs."""
    made: hf.Built = (dif if args.diffusers else hf).build(name, **changes)
    return made


def run(
    names: list[str],
    path: Path,
    args: argparse.Namespace,
    probe: Probe,
    line: Callable[[dict[str, Any]], str],
    total: Callable[[list[dict[str, Any]]], dict[str, Any]],
    warm_up: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Probe every type that has no result yet; gives the records of all that were asked for.

    line: what is printed of a record; total: what the file says of all records whose status is ok.
    """
    results = json.loads(path.read_text())["types"] if path.exists() else {}
    names = args.only.split(",") if args.only else names
    names = names[args.shard[0] :: args.shard[1]]
    todo = [name for name in names if args.again or name not in results]
    if todo:
        _prepare(library(args))
        warm_up()
    for name, result in _all(todo, args, probe):
        results[name] = result
        print(f"{name}: {line(result) if result['status'] == 'ok' else said(result)}", flush=True)
        _save(path, args, results, total)
    return {name: results[name] for name in names if name in results}


def said(result: dict[str, Any]) -> str:
    """A record without numbers, in a line."""
    return f"{result['status']} {result.get('error', '')}"


def statuses(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How many records have each status."""
    return dict(Counter(result["status"] for result in results.values()))


def _prepare(name: str) -> None:
    """Import, before the fork, what every process needs: several seconds less per type."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    __import__(f"{name}.models")


def _all(
    todo: list[str], args: argparse.Namespace, probe: Probe
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One forked process per type, `args.jobs` at a time."""
    context = multiprocessing.get_context("fork")
    waiting, live = list(todo), {}
    while waiting or live:
        while waiting and len(live) < args.jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, name, args, probe))
            process.start()
            theirs.close()
            live[name] = (process, ours, time.monotonic())
        for name, (process, pipe, start) in list(live.items()):
            result = _poll(process, pipe, time.monotonic() - start, args.timeout)
            if result is not None:
                process.join()
                del live[name]
                yield name, result


def _poll(process: Any, pipe: Any, seconds: float, limit: float) -> dict[str, Any] | None:
    if pipe.poll(0.05):
        try:
            received: dict[str, Any] = pipe.recv()
            return received
        except EOFError:
            return {"status": "died", "error": "the process ended without an answer"}
    if seconds > limit:
        process.kill()
        return {"status": "timeout", "error": f"more than {limit:g} s"}
    return None


def _child(pipe: Any, name: str, args: argparse.Namespace, probe: Probe) -> None:
    limit = args.memory << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    start = time.perf_counter()
    result = probe(name, args)
    pipe.send({**result, "seconds": round(time.perf_counter() - start, 1)})


def error(caught: Exception) -> str:
    """An exception in a line, without the folders of this machine."""
    last = traceback.extract_tb(caught.__traceback__)[-1]
    message = (str(caught).strip().splitlines() or [""])[0]
    message = re.sub(r"/\S*/", "", message)[:200]
    return f"{type(caught).__name__}: {message} ({file_of(last.filename)}:{last.lineno})"


def file_of(location: str) -> str:
    """A path, or `path:line`, without the folders."""
    return location.rsplit("/", 1)[-1]


def _save(
    path: Path,
    args: argparse.Namespace,
    results: dict[str, Any],
    total: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> None:
    name = library(args)
    head = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "fxpass": fxpass.__version__,
            "torch": torch.__version__,
            name: __import__(name).__version__,
        },
        "total": {
            "statuses": statuses(results),
            **total([result for result in results.values() if result["status"] == "ok"]),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({**head, "types": results}, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)


def names(
    args: argparse.Namespace, wanted: Callable[[list[str]], bool] = lambda texts: True
) -> list[str]:
    """Transformer classes of diffusers, or model types of transformers that have a base model.

    `wanted` gets the text of a type's modeling files.
    """
    if args.diffusers:
        return sorted(dif_special.CLASSES)
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    root = Path(transformers.__file__).parent / "models"

    def sources(name: str) -> list[str]:
        folder = root / configuration_auto.model_type_to_module_name(name)
        return [file.read_text() for file in folder.glob("modeling_*.py")]

    return [name for name in modeling_auto.MODEL_MAPPING_NAMES if wanted(sources(name))]
