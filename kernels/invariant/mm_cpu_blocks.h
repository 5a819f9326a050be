// Which part of the output is computed when, and by whom. Comes after mm_cpu.h.
#pragma once

static inline fx_i64 rounded_up(fx_i64 value, fx_i64 unit) { return (value + unit - 1) / unit * unit; }

struct Scratch {  // of one thread, kept: a fresh mapping costs more than a small product
  void* memory = nullptr;
  ~Scratch() { free(memory); }
};

enum { A_SIZE = M_BLOCK * A_ROW, B_SIZE = CHUNK * N_BLOCK, C_SIZE = M_BLOCK * N_BLOCK };

static C* scratch() {
  static thread_local Scratch own;
  const size_t size = (A_SIZE + B_SIZE + C_SIZE) * sizeof(C);
  if (!own.memory && posix_memalign(&own.memory, 64, size)) abort();
  return (C*)own.memory;
}

// ---- Thick: both operands packed ----------------------------------------------------------------

template <bool SKIP>
static void thick(const FxProduct& p, const Block& at) {
  C *a = scratch(), *b = a + A_SIZE, *sums = b + B_SIZE;
  const fx_i64 tiles = (at.rows + TILE - 1) / TILE;
  const fx_i64 high = rounded_up((at.rows + tiles - 1) / tiles, 2);
  for (fx_i64 start = 0; start < p.k; start += CHUNK) {
    const fx_i64 k = p.k - start < CHUNK ? p.k - start : CHUNK;
    for (fx_i64 r = 0; r < at.rows; ++r) take_a(p, a_at(p, at, r, start), k, a + r * A_ROW);
    const Element* from = b_at(p, at, start);
    for (fx_i64 j = 0; j < at.columns; j += PANEL)
      pack_panel(from + j * p.b_stride[3], p.b_stride[2], p.b_stride[3], k,
                 at.columns - j < PANEL ? at.columns - j : PANEL, b + j * CHUNK);
    for (fx_i64 r = 0; r < at.rows; r += high) {
      const int rows = (int)(at.rows - r < high ? at.rows - r : high);
      for (fx_i64 j = 0; j < at.columns; j += PANEL)
        tile_of<SKIP>(rows, a + r * A_ROW, b + j * CHUNK, k, sums + r * N_BLOCK + j, start == 0);
    }
  }
  write_out(p, at, sums, N_BLOCK);
}

// ---- Thin: b is read once, where it lies --------------------------------------------------------

// sum[r][0, columns) goes U steps along k; rows of b are contiguous.
template <int R, int U, bool SKIP>
static inline void down(const C* a, const Element* b, fx_i64 k_stride, fx_i64 columns, C* sum) {
  V factor[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) factor[r][u] = splat(a[r * A_ROW + u]);
  for (fx_i64 j = 0; j < columns; j += VL) {
    V value[U];
    for (int u = 0; u < U; ++u) {
      const Element* from = b + u * k_stride + j;
      value[u] = columns - j >= VL ? get(from) : get(from, columns - j);
    }
    for (int r = 0; r < R; ++r) {
      V now = get(sum + r * THIN_BLOCK + j);
      for (int u = 0; u < U; ++u) now = step<SKIP>(factor[r][u], value[u], now);
      put(sum + r * THIN_BLOCK + j, now);
    }
  }
}

template <int R, bool SKIP>
static void thin_down(const FxProduct& p, const Block& at) {
  alignas(64) C a[R * A_ROW], sum[R * THIN_BLOCK], total[R * THIN_BLOCK];
  enum { U = 4 };
  const fx_i64 step = p.b_stride[2];
  for (fx_i64 start_k = 0; start_k < p.k; start_k += CHUNK) {
    const fx_i64 k = p.k - start_k < CHUNK ? p.k - start_k : CHUNK;
    for (int r = 0; r < R; ++r) take_a(p, a_at(p, at, r, start_k), k, a + r * A_ROW);
    C* into = start_k == 0 ? total : sum;
    for (fx_i64 i = 0; i < R * THIN_BLOCK; i += VL) put(into + i, V{});
    const Element* b = b_at(p, at, start_k);
    fx_i64 i = 0;
    for (; i + U <= k; i += U) down<R, U, SKIP>(a + i, b + i * step, step, at.columns, into);
    for (; i < k; ++i) down<R, 1, SKIP>(a + i, b + i * step, step, at.columns, into);
    if (start_k > 0)
      for (fx_i64 j = 0; j < R * THIN_BLOCK; j += VL) put(total + j, get(total + j) + get(sum + j));
  }
  write_out(p, at, total, THIN_BLOCK);
}

// `steps` of VL along k: row v of `b` holds VL columns at k = v.
template <int R>
static inline void along(const C* a, fx_i64 pitch, const V* b, int steps, V* sum) {
  for (int v = 0; v < steps; ++v)
    for (int r = 0; r < R; ++r) sum[r] = fma(splat(a[r * pitch + v]), b[v], sum[r]);
}

// One chunk of VL columns of b, each contiguous along k (the rows of a linear layer's weight).
template <int R>
static inline void across(const Element* b, const fx_i64* place, fx_i64 k, const C* a, fx_i64 pitch,
                          V* sum) {
  for (int r = 0; r < R; ++r) sum[r] = V{};
  fx_i64 i = 0;
  for (; i + VL <= k; i += VL) {
    V block[VL];
    for (int v = 0; v < VL; ++v) block[v] = get(b + place[v] + i);
    transpose(block);
    along<R>(a + i, pitch, block, VL, sum);
  }
  if (i == k) return;
  V block[VL];
  for (int v = 0; v < VL; ++v) block[v] = get(b + place[v] + i, k - i);
  transpose(block);
  along<R>(a + i, pitch, block, (int)(k - i), sum);
}

template <int R>
static void thin_across(const FxProduct& p, const Block& at) {
  alignas(64) C total[R * THIN_BLOCK];
  C* a = (C*)malloc(R * p.k * sizeof(C));
  if (!a) abort();
  for (int r = 0; r < R; ++r) take_a(p, a_at(p, at, r, 0), p.k, a + r * p.k);
  for (fx_i64 j = 0; j < at.columns; j += VL) {
    fx_i64 place[VL];  // past the end: the last column again, thrown away
    for (int v = 0; v < VL; ++v)
      place[v] = (j + v < at.columns ? j + v : at.columns - 1) * p.b_stride[3];
    V sums[R];
    for (fx_i64 start = 0; start < p.k; start += CHUNK) {
      V sum[R];
      const fx_i64 k = p.k - start < CHUNK ? p.k - start : CHUNK;
      across<R>(b_at(p, at, start), place, k, a + start, p.k, sum);
      for (int r = 0; r < R; ++r) sums[r] = start ? sums[r] + sum[r] : sum[r];
    }
    for (int r = 0; r < R; ++r) put(total + r * THIN_BLOCK + j, sums[r]);
  }
  free(a);
  write_out(p, at, total, THIN_BLOCK);
}

template <int R = THIN>
static void thin(const FxProduct& p, const Block& at) {
  if (at.rows != R) {
    if constexpr (R > 1) thin<R - 1>(p, at);
  } else if (p.b_stride[3] != 1 && p.b_stride[2] == 1) {
    thin_across<R>(p, at);
  } else {
    p.skip ? thin_down<R, true>(p, at) : thin_down<R, false>(p, at);
  }
}

// ---- The whole output ---------------------------------------------------------------------------

// Columns of a task: at most `most`, fewer if some thread would get none.
static fx_i64 width(const FxProduct& p, fx_i64 others, fx_i64 most) {
  const fx_i64 wanted = (2 * p.threads + others - 1) / others;
  const fx_i64 even = rounded_up((p.n + wanted - 1) / wanted, PANEL);
  return p.threads == 1 || even > most ? most : even;
}

static void run(const FxProduct& p) {
  const bool streams = p.b_stride[3] == 1 || (p.b_stride[2] == 1 && !p.skip);
  const bool is_thin = p.m <= THIN && streams;
  const fx_i64 high = is_thin ? p.m : M_BLOCK, down = (p.m + high - 1) / high;
  const fx_i64 batches = p.outer * p.inner;
  const fx_i64 wide = width(p, batches * down, is_thin ? THIN_BLOCK : N_BLOCK);
  const fx_i64 along = (p.n + wide - 1) / wide;
  each(batches * down * along, p.threads, [&](fx_i64 task) {
    Block at;
    at.column = task / down % along * wide;
    at.columns = p.n - at.column < wide ? p.n - at.column : wide;
    at.row = task % down * high;
    at.rows = p.m - at.row < high ? p.m - at.row : high;
    at.outer = task / (down * along) / p.inner;
    at.inner = task / (down * along) % p.inner;
    if (is_thin) return thin(p, at);
    p.skip ? thick<true>(p, at) : thick<false>(p, at);
  });
}

extern "C" __attribute__((visibility("default"))) void fxpass_product(const FxProduct* p) {
  run(*p);
}
