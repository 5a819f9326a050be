# ruff: noqa: E741, N803 - names of the formulas, constants uppercase, constant conditions
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""Attention in Triton; the bits of a query row depend on it and on the keys its mask lets in.

Keys are taken in blocks of 2**LEVELS from key 0 on, and blocks in chunks of CHUNK keys. In a chunk,
for each row, in float32 and units of log2:

    t = q.k * scale + mask        -inf where the mask, causality or the end of the keys says so
    m' = max(m, max t)            p = exp2(t - m')
    l = l * exp2(m - m') + sum p, far halves first
    o = o * exp2(m - m') + round(p).v

and chunks are merged in order in the same way. So a block or a chunk without a visible key changes
nothing (its p are 0, the factors 1), and whether it is skipped, how many rows share a tile, which
heads they are of, and who computes a chunk changes no bit.

A key that a row may not see still meets it in the product with v, as 0 * v. That is 0 unless v is
infinite or NaN; a tile with such a result is done again by `_repaired`, where only visible values
count: NaN gives NaN, an infinity that infinity, two of them NaN.
"""

import triton
import triton.language as tl

from fxpass.kernels.invariant.triton_math import inverse, log_positive

_LOG2E = tl.constexpr(1.4426950216293335)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.0e38)
"""Below a finite mask in units of log2: the least float32 mask still differs from -inf."""
_PLAIN, _CLEAN, _NAN, _UP, _DOWN = (tl.constexpr(kind) for kind in range(5))
"""What of v is multiplied: all, the finite, or which of it is NaN, inf, -inf."""


@triton.jit
def _row_sum(x, LEVELS: tl.constexpr):
    """(rows, 2**LEVELS) -> (rows,): far halves are added, which a thread holds both of."""
    for _ in tl.static_range(LEVELS - 1):
        x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), axis=1)
    return tl.sum(x, axis=1)


@triton.jit
def _factor(before, after):
    """exp2(before - after): 0 where nothing was seen before."""
    return tl.exp2(before - tl.where(after == float("-inf"), 0.0, after))


@triton.jit
def _merged(m, l, o, m_more, l_more, o_more):
    """Two runs of keys as one."""
    top = tl.maximum(m, m_more)
    old, new = _factor(m, top), _factor(m_more, top)
    return top, l * old + l_more * new, o * old[:, None] + o_more * new[:, None]


@triton.jit
def _chosen(v, kind):
    """What of v is multiplied, by `kind`; no infinity and no NaN."""
    wide = v.to(tl.float32)
    clean = tl.where(tl.abs(wide) < float("inf"), wide, 0.0)
    nan = (wide != wide).to(tl.float32)
    up = (wide == float("inf")).to(tl.float32)
    down = (wide == float("-inf")).to(tl.float32)
    other = tl.where(kind == _NAN, nan, tl.where(kind == _UP, up, down))
    return tl.where(kind == _CLEAN, clean, other).to(v.dtype)


@triton.jit
def _walk(
    q, k, v, mask, i, first, last, lk, scale, k_row, v_row, mask_col, kind,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(m, l, o) of the rows of q over keys first to last - 1; first is a multiple of CHUNK."""
    rows: tl.constexpr = q.shape[0]
    block: tl.constexpr = 1 << LEVELS
    low = float("-inf")
    m, l = tl.full([rows], low, tl.float32), tl.zeros([rows], tl.float32)
    o = tl.zeros([rows, DV_PAD], tl.float32)
    m_all, l_all, o_all = m, l, o
    inside, d, dv = tl.arange(0, block), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    for start in tl.range(first, last, block, num_stages=1 if CAREFUL else None):
        n = start + inside
        base = tl.cast(start, tl.int64)
        there = n < lk
        keys = tl.load(
            k + base * k_row + d[:, None] + inside[None, :] * k_row,
            mask=(d[:, None] < D) & there[None, :], other=0.0,
        )  # fmt: skip
        values = tl.load(
            v + base * v_row + inside[:, None] * v_row + dv[None, :],
            mask=there[:, None] & (dv[None, :] < DV), other=0.0,
        )  # fmt: skip
        t = tl.dot(q, keys, input_precision="ieee") * scale
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= i[:, None])
        if MASK != "none":
            told = tl.load(
                mask[:, None] + n.to(tl.int64)[None, :] * mask_col, mask=there[None, :], other=0
            )
            if MASK == "bool":
                # Triton orders k inside a matrix instruction by the narrowest load that it finds
                # behind an operand; it does not look behind a reduction.
                seen = seen & (tl.max(told[:, :, None].to(tl.int32), axis=2) != 0)
            else:
                told = told.to(tl.float32)
                seen = seen & (told != low)
                told = told * _LOG2E
                t += tl.where(told < _LOWEST, _LOWEST, told)
        if CAREFUL:
            # What a row sees does not depend on how much: every weight is 1.
            t = tl.where(kind == _CLEAN, t, 0.0)
            values = _chosen(values, kind)
        t = tl.where(seen, t, low)
        top = tl.maximum(m, tl.max(t, axis=1))
        p = tl.exp2(t - tl.where(top == low, 0.0, top)[:, None])
        old = _factor(m, top)
        m = top
        l = l * old + _row_sum(p, LEVELS)
        o = o * old[:, None]
        o = tl.dot(p.to(values.dtype), values, o, input_precision="ieee")
        if (start + block) % CHUNK == 0:
            m_all, l_all, o_all = _merged(m_all, l_all, o_all, m, l, o)
            m, l = tl.full([rows], low, tl.float32), tl.zeros([rows], tl.float32)
            o = tl.zeros([rows, DV_PAD], tl.float32)
    return _merged(m_all, l_all, o_all, m, l, o)


@triton.jit
def _finished(l, o):
    """The mean of v, 0 if nothing is seen; never -0, which a block of zeros would change."""
    return o * tl.where(l == 0.0, 0.0, inverse(l))[:, None] + 0.0


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def attention(
    q, k, v, mask, out, lse, m_out, scale, rows, lq, lk, heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, out_batch, out_head, out_row,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M rows of PACK heads, that is of PACK * lq rows, which share a head of k.

    rows: of all tiles. group: heads of q for one of k, a multiple of PACK. scale: in units of log2.
    SPLIT: program (., c) takes chunk c alone. It writes its float32 o to `out`, l to `lse` and m to
    `m_out`, each with the chunk as an outermost dim; `merge` does the rest.
    """
    tiles = tl.cdiv(PACK * lq, BLOCK_M)
    packs = heads // PACK
    # Late rows see most keys when causal: they go first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    pack = tl.program_id(0) // tiles
    batch, head = (pack // packs).to(tl.int64), pack % packs * PACK
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = r < PACK * lq
    i = r % lq
    own = (head + r // lq).to(tl.int64)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    row = i.to(tl.int64)
    asked = tl.load(
        q + batch * q_batch + (own * q_head + row * q_row)[:, None] + d[None, :],
        mask=present[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    k += batch * k_batch + (head // group).to(tl.int64) * k_head
    v += batch * v_batch + (head // group).to(tl.int64) * v_head
    # Absent rows read what the first of the tile reads.
    told = tl.where(present, own * mask_head + row * mask_row, 0)
    mask += batch * mask_batch + told
    last = lk
    if CAUSAL:
        final = tl.minimum(tile * BLOCK_M + BLOCK_M, PACK * lq) - 1
        alone = (tile * BLOCK_M) // lq == final // lq
        last = tl.minimum(lk, tl.where(alone, final % lq, lq - 1) + 1)
    first = 0
    if SPLIT:
        chunk = tl.program_id(1)
        first = chunk * CHUNK
        last = tl.minimum(last, first + CHUNK)
        out += chunk.to(tl.int64) * rows * DV
    m, l, o = _walk(
        asked, k, v, mask, i, first, last, lk, scale, k_row, v_row, mask_col, _PLAIN,
        LEVELS, CHUNK, D, DV, D_PAD, DV_PAD, CAUSAL, MASK, False,
    )  # fmt: skip
    place = out + batch * out_batch + (own * out_head + row * out_row)[:, None] + dv[None, :]
    there = present[:, None] & (dv[None, :] < DV)
    y = o if SPLIT else _finished(l, o)
    tl.store(place, y.to(out.dtype.element_ty), mask=there)
    line = (batch * heads + own) * lq + row
    if SPLIT:
        line += tl.program_id(1).to(tl.int64) * rows
        tl.store(lse + line, l, mask=present)
        tl.store(m_out + line, m, mask=present)
    else:
        tl.store(lse + line, _logsumexp(m, l), mask=present)
    if tl.max(tl.where(_is_finite(o), 0, 1)) > 0:
        for kind in range(1, 5):
            m, l, o = _walk(
                asked, k, v, mask, i, first, last, lk, scale, k_row, v_row, mask_col, kind,
                LEVELS, CHUNK, D, DV, D_PAD, DV_PAD, CAUSAL, MASK, True,
            )  # fmt: skip
            tl.debug_barrier()  # the tile may be read by other threads than wrote it
            y = o if SPLIT else _finished(l, o)
            found = tl.load(place, mask=there, other=0.0).to(tl.float32)
            y = tl.where(kind == _CLEAN, y, _repaired(found, o, kind))
            tl.debug_barrier()
            tl.store(place, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _repaired(found, count, kind):
    """A result with the infinity of `kind`, or NaN, added where one was counted."""
    up = tl.where(kind == _UP, float("inf"), float("-inf"))
    bad = tl.where(kind == _NAN, float("nan"), up)
    return tl.where(count > 0.0, tl.where(_is_finite(found), 0.0, found) + bad, found)


@triton.jit
def _logsumexp(m, l):
    """Natural; 0 for a row that sees nothing, as torch's memory-efficient kernel has it."""
    nothing = l == 0.0
    return tl.where(nothing, 0.0, m * _LN2 + log_positive(tl.where(nothing, 1.0, l)))


@triton.jit
def merge(
    parts, sums, tops, out, lse, rows, chunks, lq, heads, out_batch, out_head, out_row,
    ROWS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """The chunks' (o, l, m), (chunks, rows, DV) and (chunks, rows), in order."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = r < rows
    dv = tl.arange(0, DV_PAD)
    there = present[:, None] & (dv[None, :] < DV)
    m, l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, DV_PAD], tl.float32)
    bad = tl.zeros([ROWS, DV_PAD], tl.float32)
    for chunk in range(chunks):
        line = tl.cast(chunk, tl.int64) * rows + r
        part = tl.load(parts + line[:, None] * DV + dv[None, :], mask=there, other=0.0)
        bad += tl.where(_is_finite(part), 0.0, part)
        part = tl.where(_is_finite(part), part, 0.0)
        l_more = tl.load(sums + line, mask=present, other=0.0)
        m_more = tl.load(tops + line, mask=present, other=float("-inf"))
        m, l, o = _merged(m, l, o, m_more, l_more, part)
    y = tl.where(bad == 0.0, _finished(l, o), bad)
    row, own = (r % lq).to(tl.int64), (r // lq).to(tl.int64)
    place = own // heads * out_batch + own % heads * out_head + row * out_row
    tl.store(out + place[:, None] + dv[None, :], y.to(out.dtype.element_ty), mask=there)
    tl.store(lse + r, _logsumexp(m, l), mask=present)
