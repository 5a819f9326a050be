"""Attention on a GPU; the bits of a query row depend on it and on the keys its mask lets in.

So a decoded token and the same position of a causal prefill agree, and padding that is masked out,
by False or -inf, changes nothing, even if it holds NaN: see `attention_triton` for the arithmetic.
Positions count: the same keys after left padding are other blocks. Scores, sums and results are
float32; the weights are rounded to v's dtype for the product with v. float32 inputs are multiplied
in float32.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch

from fxpass.kernels.invariant.mm_plan import device_of
from fxpass.kernels.invariant.triton_launch import launch

Tensor = torch.Tensor

CHUNK = 512
"""Keys of a chunk: part of the meaning."""
_HEAD_MOST = 256
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
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


def schedule(q: Tensor, k: Tensor, head: int, major: int = 9) -> Schedule:
    """For q (B, Hq, Lq, D) and k (B, Hkv, Lk, D); head: the larger of D and v's.

    major: of an NVIDIA GPU's compute capability. 10 and 11 have one tile, since tcgen05 computes
    large ones and mma small ones; elsewhere the bits of all tiles agree (measured on an H200).
    """
    batch, heads, lq, _ = q.shape
    group = heads // k.shape[1]
    most = 32 if q.dtype == torch.float32 else 64 if head > 128 else 128
    pack = group if lq < most else 1
    rows = pack * lq
    least = most if major in (10, 11) else min(rows, most)
    block_m = next(size for size in (16, 32, 64, 128) if size >= least)
    tiles = batch * (heads // pack) * -(-rows // block_m)
    split = rows <= 128 and tiles < _PROGRAMS_WANTED and k.shape[2] > CHUNK
    warps = 8 if block_m == 128 or (block_m == 64 and head > 128) else 4
    return Schedule(pack, block_m, warps, 2 if head > 64 else 3, split)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q @ k^T * scale + mask) @ v.

    Args:
        q: (B, Hq, Lq, D), bfloat16, float16 or float32.
        k: (B, Hkv, Lk, D), q's dtype; Hq is a multiple of Hkv, whose heads are shared in order.
        v: (B, Hkv, Lk, Dv), q's dtype.
        mask: bool (True lets a key in) or additive, broadcastable to (B, Hq, Lq, Lk).
        causal: query i sees keys 0 to i.
        scale: 1 / sqrt(D) if None.

    Returns:
        out (B, Hq, Lq, Dv) in q's dtype, in memory (B, Lq, Hq, Dv) as torch's own kernels leave it,
        and the natural logsumexp of the scores, (B, Hq, Lq), float32. A row that sees no key is 0
        in both.

    Raises:
        TypeError: for dtypes that no kernel takes, or tensors of two dtypes or devices.
        ValueError: for shapes that do not fit, or heads of more than 256 elements.
    """
    _check(q, k, v, mask)
    batch, heads, lq, head = q.shape
    lk, wide = v.shape[2], v.shape[3]
    out = torch.empty((batch, lq, heads, wide), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, lq), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    found = schedule(q, k, max(head, wide), device_of(q.get_device()).major)
    scale = head**-0.5 if scale is None else scale
    if found.split:
        rows, chunks = lse.numel(), -(-lk // CHUNK)
        parts = q.new_empty((chunks, batch, heads, lq, wide), dtype=torch.float32)
        sums, tops = (q.new_empty((chunks, rows), dtype=torch.float32) for _ in range(2))
        _tiles(q, k, v, mask, parts[0], sums, tops, causal, scale, found)
        _merge(parts, sums, tops, out, lse)
    else:
        _tiles(q, k, v, mask, out, lse, lse, causal, scale, found)
    return out, lse


def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tops: Tensor,
    causal: bool,
    scale: float,
    found: Schedule,
) -> None:
    from fxpass.kernels.invariant import attention_triton

    batch, heads, lq, head = q.shape
    lk, wide = v.shape[2], v.shape[3]
    kind, told, mask_strides = _masked(q, lk, mask)
    tiles = batch * (heads // found.pack) * -(-found.pack * lq // found.block_m)
    numbers = (scale * _LOG2E, batch * heads * lq, lq, lk, heads, heads // k.shape[1])
    strides = (t.stride()[:3] for t in (q, k, v))
    constants = {
        "PACK": found.pack,
        "BLOCK_M": found.block_m,
        "LEVELS": block_n(max(head, wide), q.dtype).bit_length() - 1,
        "CHUNK": CHUNK,
        "D": head,
        "DV": wide,
        "D_PAD": _padded(head),
        "DV_PAD": _padded(wide),
        "CAUSAL": causal,
        "MASK": kind,
        "SPLIT": found.split,
    }
    launch(
        attention_triton.attention,
        (tiles, -(-lk // CHUNK) if found.split else 1),
        (q, k, v, told, out, lse, tops),
        (*numbers, *chain(*strides), *mask_strides, *out.stride()[:3]),
        constants,
        options(found, kind, torch.version.hip is not None),
    )


def _merge(parts: Tensor, sums: Tensor, tops: Tensor, out: Tensor, lse: Tensor) -> None:
    from fxpass.kernels.invariant import attention_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    _, heads, lq, wide = out.shape
    rows = lse.numel()
    together = max(1, 512 // _padded(wide))
    launch(
        attention_triton.merge,
        (-(-rows // together),),
        (parts, sums, tops, out, lse),
        (rows, len(parts), lq, heads, *out.stride()[:3]),
        {"ROWS": together, "DV": wide, "DV_PAD": _padded(wide)},
        {"num_warps": 4, **FIXED},
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


def _masked(q: Tensor, lk: int, mask: Tensor | None) -> tuple[str, Tensor, tuple[int, ...]]:
    """The kernel's word for the mask, the mask (or a tensor in its place), and its strides."""
    if mask is None:
        return "none", q, (0, 0, 0, 0)
    told = mask.expand(*q.shape[:3], lk)
    if mask.dtype == torch.bool:
        return "bool", told.view(torch.uint8), told.stride()
    return "add", told, told.stride()


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dtype not in _FLOATS:
        raise TypeError(f"attention of {q.dtype}; needs bfloat16, float16 or float32")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, needs {q.dtype} on {q.device}"
            )
    if not (q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]):
        raise ValueError(f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}; needs (B, H, L, D) each")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {_shape(q)} and k {_shape(k)} differ in the first or the last dim")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of q, needs a multiple of k's {k.shape[1]}")
    if not 0 < max(q.shape[3], v.shape[3]) <= _HEAD_MOST:
        raise ValueError(
            f"heads of {q.shape[3]} and {v.shape[3]} elements, needs 1 to {_HEAD_MOST}"
        )
    if mask is not None and (mask.device != q.device or mask.dtype not in (torch.bool, *_FLOATS)):
        raise TypeError(f"mask is {mask.dtype} on {mask.device}, needs bool or float on {q.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
