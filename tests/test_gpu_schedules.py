"""Every way `cuda.row` can spread a row over threads gives the same bits, also those not in use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_cases import ALL
from kernel_cases import EPS, Inputs, inputs, same_bits
from test_cuda import partial_sums, spread_of, units_of
from test_gpu_kernels import on_device

from fxpass.kernels import by_name
from fxpass.kernels.cuda_call import RowKernel
from fxpass.kernels.cuda_source import AT_ONCE, LOADED, STORED, SUMMED, Schedule
from fxpass.spec import NormSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
HIDDEN = (8, 40, 120, 257, 1000, 2048, 5120, 8192, 9216, 16_384, 20_000)
THREADS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 256, 320, 512, 640, 1024)
SEGMENTS = (32, 64, 128, 256, 512)
ROWS = 37


def is_legal(units: int, schedule: Schedule) -> bool:
    """As the kernel's own static_asserts have it."""
    spread = spread_of(units, schedule)
    if spread > min(schedule.threads, 32) or spread * schedule.blocks > 32:
        return False
    return partial_sums(units, schedule) <= 32


def schedules(hidden: int) -> Iterator[Schedule]:
    """All that are legal, with every time to load the weight, and by turns with every time to let
    the next kernel in, elements widened again or not."""
    units = units_of(hidden)
    found = [
        Schedule(threads, max(1, block // threads))
        for threads, block in itertools.product(THREADS, (32, 256))
    ]
    if CAPABILITY >= (9, 0):
        found += [
            Schedule(threads, 1, blocks=-(-units // segment), segment=segment)
            for threads, segment in itertools.product(THREADS, SEGMENTS)
            if threads >= 32 and segment % threads == 0 and 2 <= -(-units // segment) <= 8
        ]
    legal = [one for one in dict.fromkeys(found) if is_legal(units, one)]
    turns = itertools.cycle(itertools.product((AT_ONCE, LOADED, SUMMED, STORED), (True, False)))
    for schedule, weight in itertools.product(legal, range(3)):
        release, again = next(turns)
        moment = {"weight": weight, "release": release, "again": again, "last": weight == 1}
        yield dataclasses.replace(schedule, **moment)


def layouts(spec: NormSpec, hidden: int) -> Iterator[Inputs]:
    """Rows behind each other, and rows with two strides and five weights."""
    yield on_device(inputs(spec, ROWS, hidden, seed=hidden))
    given = on_device(inputs(spec, 6, 5, hidden, weight_rows=5, seed=hidden))
    yield given.map_rows(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("name", ["llama", "residual", "llama_f32", "nn_rms_norm"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_legal_schedule_gives_the_same_bits(name: str, hidden: int) -> None:
    spec = ALL[name]
    every = list(schedules(hidden))
    assert len(every) >= 3
    kernels = [RowKernel(spec, hidden, 0, lambda *_, one=one: one) for one in every]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: kernel.prepare([1]), kernels))
    for given in layouts(spec, hidden):
        wanted = given.run(by_name("triton.row"), spec)
        for schedule, kernel in zip(every, kernels, strict=True):
            found = kernel(given.x, given.residual, given.weight, None, EPS)
            tensors = found if isinstance(found, tuple) else (found,)
            for output, tensor in zip(spec.outputs, tensors, strict=True):
                assert same_bits(tensor, wanted[output]), (schedule, output, given.x.stride())
