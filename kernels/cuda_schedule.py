"""How `cuda.row` spreads rows over threads: a choice of speed, no bit depends on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxpass.kernels import cuda_cluster_tables, cuda_source, cuda_tables, gpu_rows
from fxpass.kernels.cuda_source import AT_ONCE, LOADED, SUMMED, Schedule
from fxpass.spec import NormSpec


def schedule(spec: NormSpec, hidden: int, rows: int, capability: tuple[int, int]) -> Schedule:
    """The schedule for so many rows on a device of that compute capability."""
    last = capability == cuda_tables.LAST_ON and rows >= _rows_read_last(spec, hidden)
    found = _with_room(spec, hidden, rows, _spread(spec, hidden, rows, capability))
    return dataclasses.replace(found, last=last)


def _spread(spec: NormSpec, hidden: int, rows: int, capability: tuple[int, int]) -> Schedule:
    units, kind = -(-hidden // gpu_rows.VECTOR), cuda_source.kind(spec)
    if capability >= cuda_cluster_tables.CAPABILITY:
        for rows_up_to, found in _of_own_rows(kind, units):
            if rows <= rows_up_to:
                return found
    if hidden > gpu_rows.MOST_LANES:
        few = rows <= cuda_cluster_tables.LONG_AT_ONCE
        release = AT_ONCE if few else SUMMED
        return Schedule(cuda_cluster_tables.LONG[kind], 1, release, weight=2 if few else 0)
    size = next((word for most, word in cuda_tables.SIZES if rows <= most), "many")
    table = cuda_tables.WHOLE.get((size, kind)) or cuda_tables.WHOLE[size, "light"]
    whole = next(found for found in table if units <= found.up_to)
    threads = threads_of(units, whole.each)
    found = Schedule(
        threads,
        max(1, whole.block // threads),
        whole.release,
        weight=whole.weight,
        registers=whole.registers,
        again=whole.again,
    )
    return _fitted(hidden, rows, found) if whole.registers == cuda_tables.FIT else found


def _fitted(hidden: int, rows: int, found: Schedule) -> Schedule:
    """With the registers that `cuda_tables.FIT` stands for."""
    blocks = blocks_each(found, max(1, rows))
    fit = min(registers_for(found, blocks), cuda_tables.MOST_REGISTERS)
    fewest = cuda_tables.FEWEST[cuda_source.units_of_thread(hidden, found)]
    return dataclasses.replace(found, registers=fit if fit >= fewest else 0)


def registers_for(one: Schedule, blocks: int) -> int:
    """Most that a thread may have where a multiprocessor holds so many blocks: a multiple of 8."""
    warps = blocks * -(-one.threads * one.rows // 32)
    return cuda_source.LANE_REGISTERS // -(-warps // 4) // 8 * 8


def _with_room(spec: NormSpec, hidden: int, rows: int, found: Schedule) -> Schedule:
    """Let the next kernel in before the sum only where its blocks spread evenly.

    Else some multiprocessors get more rows than others: 384 x 6144 took 1.4 times as long as with
    SUMMED.
    """
    if found.release not in (AT_ONCE, LOADED):
        return found
    even = spreads_evenly(blocks_each(found, rows), cuda_source.room(spec, hidden, found))
    return found if even else dataclasses.replace(found, release=SUMMED)


def blocks_each(one: Schedule, rows: int) -> int:
    """Blocks for the multiprocessor that gets most."""
    return -(-(-(-rows // one.rows) * one.blocks) // cuda_tables.MULTIPROCESSORS)


def spreads_evenly(each: int, room: int) -> bool:
    """Whether another grid of `each` blocks a multiprocessor, which has room for `room`, does.

    It does if there is room for all of it, or for none.
    """
    return each >= room or 2 * each <= room


def _rows_read_last(spec: NormSpec, hidden: int) -> int:
    """From how many rows on the L2 is to evict last what is read."""
    return -(-cuda_tables.LAST_FROM[cuda_source.kind(spec)] // gpu_rows.moved(spec, hidden))


def changes(spec: NormSpec, hidden: int) -> list[int]:
    """The numbers of rows at which another schedule may begin, on any device."""
    units = -(-hidden // gpu_rows.VECTOR)
    own = list(_of_own_rows(cuda_source.kind(spec), units))
    ends = {end for end, _ in own} - {cuda_cluster_tables.EVERY}
    ends |= {most for most, _ in cuda_tables.SIZES} | {cuda_cluster_tables.LONG_AT_ONCE}
    # Where `_fitted` and `_with_room` count a block more on a multiprocessor.
    few, step = cuda_tables.SIZES[-1][0], cuda_tables.MULTIPROCESSORS
    for end, blocks in [(few, 1), *((end, found.blocks) for end, found in own)]:
        ends |= {n // blocks for n in range(step, min(end, few) * blocks + 1, step)}
    return sorted({1, _rows_read_last(spec, hidden)} | {end + 1 for end in ends})


def _of_own_rows(kind: str, units: int) -> Iterator[tuple[int, Schedule]]:
    """Schedules that have row counts of their own, not SIZES: the first for so many rows is it."""
    lanes = gpu_rows.MOST_LANES // gpu_rows.VECTOR
    if units > lanes:
        for long in cuda_cluster_tables.SEVERAL_CHUNKS[kind]:
            if long.above < units <= long.up_to:
                yield long.most, _shared(long, lanes // long.segment)
        return
    clusters = cuda_cluster_tables.CLUSTERS
    for found in clusters.get(kind) or clusters["light"]:
        blocks = -(-units // found.segment)
        if found.above < units <= found.up_to and blocks <= cuda_cluster_tables.MOST_BLOCKS:
            yield found.most // blocks, _shared(found, blocks)


def _shared(found: cuda_cluster_tables.Cluster | cuda_cluster_tables.Long, blocks: int) -> Schedule:
    """Of rows that so many blocks share."""
    return Schedule(
        found.threads,
        1,
        found.release,
        blocks,
        found.segment if blocks > 1 else 0,
        weight=found.weight,
        registers=found.registers,
        again=found.again,
    )


def threads_of(units: int, each: int) -> int:
    """Of a row, with so many units for each: a power of two below 32, a multiple of 32 above."""
    count = -(-units // each)
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32
