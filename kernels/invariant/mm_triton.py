# ruff: noqa: N803, SIM102, SIM108 - constants are uppercase, constant conditions stand alone
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""Matrix products in Triton whose bits are those of `chunks`, whatever the schedule.

`product` reads through pointers, `product_tma` through tensor descriptors; both walk all chunks of
a tile, or one and leave its float32 sum to `finish`. One flat loop over K: a chunk ends inside it,
so that loads for the next are already under way.

Integers: m, n, k; strides in elements; `chunk` is a constant, a multiple of BLOCK_K.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools import tensor_descriptor

DESCRIPTOR = tensor_descriptor.TensorDescriptor


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: columns of GROUP tiles, so that neighbours share operands."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = min(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % height, inside // height


@triton.jit
def _rounded(total, bias, at, ok, alpha, beta, HAS_BIAS: tl.constexpr, dtype: tl.constexpr):
    """Round beta * bias + alpha * total once; the order of operations is written out."""
    if HAS_BIAS:
        added = tl.load(bias + at, mask=ok, other=0.0).to(tl.float32) * beta
        added = tl.broadcast_to(added, total.shape)
        total = tl.fma(total, tl.zeros_like(total) + alpha, added)
    else:
        total = total * alpha
    return total.to(dtype)


@triton.jit(do_not_specialize=["m"])
def product(
    a,
    b,
    bias,
    out,
    alpha,
    beta,
    m,
    n,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    bias_batch,
    bias_row,
    bias_col,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of out, or (SPLIT) of one chunk's sums: out is then (batch, chunk, m, n) float32."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    place = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    start = 0
    length = k
    batch = place
    if SPLIT:
        chunks = tl.cdiv(k, CHUNK)
        start = place % chunks * CHUNK
        length = min(k - start, CHUNK)
        batch = place // chunks
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_ok = rows < m
    col_ok = cols < n
    first = inner + start
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
        first = first.to(tl.int64)
        inner_a = tl.full((), BLOCK_K, tl.int64) * a_col
        inner_b = tl.full((), BLOCK_K, tl.int64) * b_row
    else:
        inner_a = BLOCK_K * a_col
        inner_b = BLOCK_K * b_row
    a_at = a + batch.to(tl.int64) * a_batch + (rows[:, None] * a_row + first[None, :] * a_col)
    b_at = b + batch.to(tl.int64) * b_batch + (first[:, None] * b_row + cols[None, :] * b_col)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(length, BLOCK_K)):
        if EVEN_K:
            x = tl.load(a_at, mask=row_ok[:, None], other=0.0)
            y = tl.load(b_at, mask=col_ok[None, :], other=0.0)
        else:
            k_ok = inner < length - step * BLOCK_K
            x = tl.load(a_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            y = tl.load(b_at, mask=k_ok[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        if not SINGLE and not SPLIT:
            if (step + 1) % (CHUNK // BLOCK_K) == 0:
                total += acc
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_at += inner_a
        b_at += inner_b
    total += acc
    if PDL:
        gdc_launch_dependents()
    ok = row_ok[:, None] & col_ok[None, :]
    if not SPLIT:
        wide = rows.to(tl.int64)[:, None] * bias_row
        at = batch.to(tl.int64) * bias_batch + wide + cols.to(tl.int64)[None, :] * bias_col
        total = _rounded(total, bias, at, ok, alpha, beta, HAS_BIAS, out.dtype.element_ty)
    # 64 bits to the tile's corner, 32 inside it.
    out += (place.to(tl.int64) * m + tile_m * BLOCK_M) * n + tile_n * BLOCK_N
    inside = tl.arange(0, BLOCK_M)
    if WIDE:
        inside = inside.to(tl.int64)
    at = inside[:, None] * n + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + at, total, mask=ok)


@triton.jit(do_not_specialize=["m"])
def finish(
    sums,
    bias,
    out,
    alpha,
    beta,
    m,
    n,
    bias_batch,
    bias_row,
    bias_col,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the chunks' sums (batch, CHUNKS, m, n) in order, and round: out (batch, m, n)."""
    pieces = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    batch = row // m
    cols = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    ok = cols < n
    sums += (batch * CHUNKS * m + row % m) * n
    if PDL:
        gdc_wait()
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(sums + chunk * m.to(tl.int64) * n + cols, mask=ok, other=0.0)
    at = batch * bias_batch + row % m * bias_row + cols.to(tl.int64) * bias_col
    result = _rounded(total, bias, at, ok, alpha, beta, HAS_BIAS, out.dtype.element_ty)
    tl.store(out + row * n + cols, result, mask=ok)


@triton.jit(do_not_specialize=["m"])
def product_tma(
    a,
    b,
    out,
    bias,
    alpha,
    beta,
    m,
    n,
    k,
    bias_row,
    bias_col,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of out, as many programs as wanted: a, b and out are descriptors, zeros outside."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    tile = tl.program_id(0)
    mine = tl.cdiv(tiles_m * tiles_n - tile, tl.num_programs(0))
    tile -= tl.num_programs(0)
    step = steps - 1
    row = 0
    col = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
            row = tile_m * BLOCK_M
            col = tile_n * BLOCK_N
        at = step * BLOCK_K
        if A_TRANSPOSED:
            x = a.load([at, row]).T
        else:
            x = a.load([row, at])
        if B_TRANSPOSED:
            y = b.load([col, at]).T
        else:
            y = b.load([at, col])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        if not SINGLE:
            if (step + 1) % (CHUNK // BLOCK_K) == 0:
                total += acc
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if step == steps - 1:
            if SINGLE:
                result = acc
            else:
                result = total + acc
                total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            _store(
                result,
                out,
                bias,
                row,
                col,
                alpha,
                beta,
                m,
                n,
                bias_row,
                bias_col,
                HAS_BIAS,
                FULL_BIAS,
            )


@triton.jit
def _store(
    total,
    out,
    bias,
    row,
    col,
    alpha,
    beta,
    m,
    n,
    bias_row,
    bias_col,
    HAS_BIAS: tl.constexpr,
    FULL_BIAS: tl.constexpr,
):
    """Round a tile and store it through a descriptor."""
    rows = row + tl.arange(0, total.shape[0])
    cols = col + tl.arange(0, total.shape[1])
    ok = (cols < n)[None, :]
    at = cols.to(tl.int64)[None, :] * bias_col
    if FULL_BIAS:
        ok = (rows < m)[:, None] & ok
        at = rows.to(tl.int64)[:, None] * bias_row + at
    out.store([row, col], _rounded(total, bias, at, ok, alpha, beta, HAS_BIAS, out.dtype))
