"""How attention is launched: tiles, grids, and what of both follows from the tensors.

What follows from shapes and strides is worked out once and kept: host time matters at decode sizes.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch

from fxpass.kernels.cuda_launch import empty_strided, on_device
from fxpass.kernels.gpu_rows import dense
from fxpass.kernels.invariant.mm_plan import device_of
from fxpass.kernels.steps import single
from fxpass.kernels.triton_launch import Launch

Tensor = torch.Tensor

CHUNK = 512
"""Keys of a chunk: part of the meaning."""
_PROGRAMS_WANTED = 264
"""Twice the multiprocessors of an H200: with fewer tiles, chunks are spread over programs."""
_LOG2E = 1.4426950408889634


def block_n(head: int, dtype: torch.dtype) -> int:
    """Keys of a block: part of the meaning, so a function of these two alone."""
    return 32 if dtype == torch.float32 or head > 128 else 64


class Schedule(NamedTuple):
    """How rows become tiles. Changes no bit."""

    pack: int
    """Heads of q that share a tile."""
    block_m: int
    warps: int
    stages: int
    split: bool
    """Whether each chunk is a program of its own."""


def schedule(q: Tensor, k: Tensor, head: int, one_tile: bool = False) -> Schedule:
    """For q (B, Hq, Lq, D) and k (B, Hkv, Lk, D); head: the larger of D and v's.

    one_tile: whether the bits of all tiles do not agree (on an H200 they do, measured).
    """
    batch, heads, lq, _ = q.shape
    group = heads // k.shape[1]
    most = 32 if q.dtype == torch.float32 else 64 if head > 128 else 128
    pack = group if lq < most else 1
    rows = pack * lq
    least = most if one_tile else min(rows, most)
    block_m = next(size for size in (16, 32, 64, 128) if size >= least)
    tiles = batch * (heads // pack) * -(-rows // block_m)
    split = rows <= 128 and tiles < _PROGRAMS_WANTED and k.shape[2] > CHUNK
    warps = 8 if block_m == 128 or (block_m == 64 and head > 128) else 4
    return Schedule(pack, block_m, warps, 2 if head > 64 else 3, split)


class Plan:
    """The launches for tensors like the given ones: shapes, strides, dtypes and alignment."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        *,
        aligned: bool,
    ) -> None:
        """See `attention_gpu.attention`; aligned: as of `Launch`."""
        batch, heads, lq, head = q.shape
        lk, wide = v.shape[2], v.shape[3]
        self._device = q.get_device()
        out = (batch, heads, lq, wide), (lq * heads * wide, wide, heads * wide, 1)
        self._out = (self._device, *out, q.dtype)
        self._lse = _memory(self._device, (batch, heads, lq))
        self._copies = [t.stride(-1) != 1 for t in (q, k, v)]
        self._tiles: Launch | None = None
        self._merge: Launch | None = None
        if not batch * heads * lq:
            return
        q, k, v = (
            torch.empty(t.shape, dtype=t.dtype, device="meta") if copy else t
            for t, copy in zip((q, k, v), self._copies, strict=True)
        )
        one_tile = device_of(self._device).mixes_instructions
        found = schedule(q, k, max(head, wide), one_tile)
        strides: tuple[int, ...] = out[1]
        if found.split:
            rows, chunks = batch * heads * lq, -(-lk // CHUNK)
            parts = (chunks, batch, heads, lq, wide)
            self._parts = [
                _memory(self._device, s) for s in (parts, (chunks, rows), (chunks, rows))
            ]
            self._merge = _merge(rows, chunks, lq, heads, wide, strides, aligned)
            strides = dense(parts)[1:]
        told = None if mask is None else mask.expand(*q.shape[:3], lk)
        scale = head**-0.5 if scale is None else scale
        self._tiles = _tiles(q, k, v, told, causal, scale, found, strides, aligned)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Allocates the results, and the chunks' if need be."""
        device = self._device
        with on_device(device):
            out, lse = empty_strided(*self._out), empty_strided(*self._lse)
            if self._tiles is None:
                return out, lse
            if any(self._copies):
                q, k, v = (
                    t.contiguous() if copy else t
                    for t, copy in zip((q, k, v), self._copies, strict=True)
                )
            told = q  # not read without a mask
            if mask is not None:
                told = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            if self._merge is None:
                self._tiles(device, (q, k, v, told, out, lse, lse))
            else:
                parts, sums, tops = (empty_strided(*memory) for memory in self._parts)
                self._tiles(device, (q, k, v, told, parts, sums, tops))
                self._merge(device, (parts, sums, tops, out, lse))
        return out, lse


def _memory(device: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments of `empty_strided` for float32."""
    return device, shape, dense(shape), torch.float32


def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    found: Schedule,
    strides: tuple[int, ...],
    aligned: bool,
) -> Launch:
    """strides: of batch, head and row of the result, or of one chunk's."""
    from fxpass.kernels.invariant import attention_triton

    batch, heads, lq, head = q.shape
    lk, wide = v.shape[2], v.shape[3]
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "add"
    tiles = batch * (heads // found.pack) * -(-found.pack * lq // found.block_m)
    numbers = (single(scale * _LOG2E), batch * heads * lq, lq, lk, heads, heads // k.shape[1])
    of_inputs = chain.from_iterable(t.stride()[:3] for t in (q, k, v))
    of_mask = (0, 0, 0, 0) if mask is None else mask.stride()
    constants = {
        "PACK": found.pack,
        "BLOCK_M": found.block_m,
        "LEVELS": block_n(max(head, wide), q.dtype).bit_length() - 1,
        "CHUNK": CHUNK,
        "D": head,
        "DV": wide,
        "D_PAD": padded(head),
        "DV_PAD": padded(wide),
        "CAUSAL": causal,
        "MASK": kind,
        "SPLIT": found.split,
    }
    return Launch(
        attention_triton.attention,
        (tiles, -(-lk // CHUNK) if found.split else 1),
        (*numbers, *of_inputs, *of_mask, *strides[:3]),
        constants,
        options(found, kind, torch.version.hip is not None),
        aligned=aligned,
    )


def _merge(
    rows: int,
    chunks: int,
    lq: int,
    heads: int,
    wide: int,
    strides: tuple[int, ...],
    aligned: bool,
) -> Launch:
    """strides: of batch, head and row of the result."""
    from fxpass.kernels.invariant import attention_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    together = max(1, 512 // padded(wide))
    return Launch(
        attention_triton.merge,
        (-(-rows // together),),
        (rows, chunks, lq, heads, *strides[:3]),
        {"ROWS": together, "DV": wide, "DV_PAD": padded(wide)},
        {"num_warps": 4, **FIXED},
        aligned=aligned,
    )


def options(found: Schedule, mask: str, amd: bool) -> dict[str, Any]:
    """Launch options of `attention_triton.attention` that fix the arithmetic, and the schedule's.

    mask: the kernel's word for it.
    """
    from fxpass.kernels.invariant.triton_math import FIXED

    chosen = {"num_warps": found.warps, "num_stages": found.stages, **FIXED}
    if amd:
        # One shape of matrix instruction. Triton 3.7 fails on gfx942 where loads of masks overlap.
        chosen |= {"matrix_instr_nonkdim": 16, "num_stages": found.stages if mask == "none" else 1}
    return chosen


def padded(size: int) -> int:
    """Elements of a block that holds `size`: what a matrix instruction takes, at least."""
    return max(16, 1 << (size - 1).bit_length())
