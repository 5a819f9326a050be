// The product out = alpha * a @ b + beta * bias for one element type of b. Comes after cpu_words.h.
//
// Order: K is cut into chunks of 256. Within a chunk an output element is one chain of fused
// multiply-adds over k, from zero; the chunks' sums are added in order. Everything else here (tiles,
// packing, threads, the width of registers, which of the loops runs) only decides when an element
// is computed: each fused multiply-add is one IEEE operation wherever it sits.
#pragma once

#include <stdlib.h>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { WIDTH = 64, VECTORS = 2, TILE = 12 };  // 24 of 32 registers hold sums
#define FMA_F32(a, b, c) (V) _mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c)
#define FMA_F64(a, b, c) (V) _mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c)
#define FROM_F16(h) (V) _mm512_cvtph_ps((__m256i)h)
#elif defined(__FMA__) && defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
enum { WIDTH = 32, VECTORS = 2, TILE = 6 };  // 12 of 16
#define FMA_F32(a, b, c) (V) _mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c)
#define FMA_F64(a, b, c) (V) _mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c)
#define FROM_F16(h) (V) _mm256_cvtph_ps((__m128i)h)
#elif defined(__aarch64__)
#include <arm_neon.h>
enum { WIDTH = 16, VECTORS = 4, TILE = 6 };
#define FMA_F32(a, b, c) (V) vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b)
#define FMA_F64(a, b, c) (V) vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b)
#define FROM_F16(h) (V) vcvt_f32_f16((float16x4_t)h)
#else
#error "no fused multiply-add that this product knows"
#endif

struct FxProduct {
  const void* a;
  const void* b;
  const void* bias;     // of type C, or null
  const void* divisor;  // of type C, (outer, inner, m), contiguous, or null; not with a bias
  void* out;            // contiguous
  fx_i64 outer, inner, m, n, k;
  fx_i64 a_stride[4];     // outer, inner, m, k
  fx_i64 b_stride[4];     // outer, inner, k, n
  fx_i64 bias_stride[4];  // outer, inner, m, n
  fx_i64 a_type, out_type;
  fx_i64 skip;  // a zero in a adds nothing, whatever b holds there
  fx_i64 threads;
  double alpha, beta;
};
enum { BF16, F16, F32, F64 };  // a_type, out_type

enum { CHUNK = 256, VL = WIDTH / (int)sizeof(C), PANEL = VECTORS * VL };
enum { A_ROW = CHUNK + 16 };  // not a power of two: rows would share the sets of the cache
enum { M_BLOCK = 240, N_BLOCK = 256 };
enum { THIN = 4, THIN_BLOCK = 512 };  // up to THIN rows, b is read once and not packed

typedef C V __attribute__((vector_size(WIDTH)));
typedef u16 Halves __attribute__((vector_size(VL * 2)));
typedef u32 Words __attribute__((vector_size(VL * 4)));

// ---- Vectors --------------------------------------------------------------------------------

static inline V fma(V a, V b, V c) {
  if constexpr (sizeof(C) == 4) {
    return FMA_F32(a, b, c);
  } else {
    return FMA_F64(a, b, c);
  }
}

static inline V splat(C value) { return value - V{}; }  // 0 + value would lose the sign of -0

template <class T>
static inline V get(const T* p) {
  V v;
  if constexpr (sizeof(T) == sizeof(C)) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    Halves half;
    __builtin_memcpy(&half, p, sizeof(half));
    if constexpr (T::mantissa == 8) {
      v = (V)(__builtin_convertvector(half, Words) << 16);
    } else {
      v = FROM_F16(half);
    }
  }
  return v;
}

// The first `count` elements at p, zeros behind them.
template <class T>
static inline V get(const T* p, fx_i64 count) {
  T part[VL] = {};
  __builtin_memcpy(part, p, count * sizeof(T));
  return get(part);
}

static inline void put(C* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <int FROM, int... I>
static inline V interleaved(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * VL)...);
#else
  typedef decltype(a < b) Index;
  return __builtin_shuffle(a, b, Index{(FROM + I / 2 + I % 2 * VL)...});
#endif
}

// row[i][j] becomes row[j][i]: each round rotates the bits of (i, j) by one.
static inline void transpose(V* row) {
  typedef std::make_integer_sequence<int, VL> All;
  for (int round = 1; round < VL; round *= 2) {
    V next[VL];
    for (int i = 0; i < VL / 2; ++i) {
      next[2 * i] = interleaved<0>(row[i], row[i + VL / 2], All{});
      next[2 * i + 1] = interleaved<VL / 2>(row[i], row[i + VL / 2], All{});
    }
    for (int i = 0; i < VL; ++i) row[i] = next[i];
  }
}

// One step of the chain. A step that is skipped differs from one that adds 0 in the sign of a zero
// alone, which write_block drops.
template <bool SKIP>
static inline V step(V a, V b, V sum) {
  if constexpr (SKIP) {
    return a != V{} ? fma(a, b, sum) : sum;
  } else {
    return fma(a, b, sum);
  }
}

// ---- Tiles of packed operands -------------------------------------------------------------------

// c[R][PANEL] = or += the sum of one chunk. a: R rows of A_ROW; b: [k][PANEL].
template <int R, bool SKIP>
static void tile(const C* a, const C* b, fx_i64 k, C* c, bool first) {
  V sum[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = V{};
  for (fx_i64 i = 0; i < k; ++i) {
    V value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = get(b + i * PANEL + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V factor = splat(a[r * A_ROW + i]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = step<SKIP>(factor, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      C* at = c + r * N_BLOCK + v * VL;
      put(at, first ? sum[r][v] : get(at) + sum[r][v]);
    }
}

// Tiles have an even number of rows; one more than wanted is computed and not used.
template <bool SKIP, int R = TILE>
static void tile_of(int rows, const C* a, const C* b, fx_i64 k, C* c, bool first) {
  if (rows >= R - 1) return tile<R, SKIP>(a, b, k, c, first);
  if constexpr (R > 2) tile_of<SKIP, R - 2>(rows, a, b, k, c, first);
}

// A row of a, as type C.
template <class T>
static inline void widened(const T* from, fx_i64 stride, fx_i64 count, C* to) {
  if (stride == 1) {
    for (fx_i64 i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (fx_i64 i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
  }
}

static inline void take_a(const FxProduct& p, fx_i64 offset, fx_i64 count, C* to) {
  const fx_i64 stride = p.a_stride[3];
  if constexpr (sizeof(C) == 8) {
    widened((const f64*)p.a + offset, stride, count, to);
  } else {
    if (p.a_type == BF16) return widened((const bf16*)p.a + offset, stride, count, to);
    if (p.a_type == F16) return widened((const f16*)p.a + offset, stride, count, to);
    widened((const f32*)p.a + offset, stride, count, to);
  }
}

// to[k][PANEL] from `columns` columns of b; the others are zeros, their sums are thrown away.
static void pack_panel(const Element* b, fx_i64 k_stride, fx_i64 n_stride, fx_i64 k, fx_i64 columns,
                       C* to) {
  if (columns < PANEL)
    for (fx_i64 i = 0; i < k * PANEL; ++i) to[i] = 0;
  if (n_stride == 1 && columns == PANEL) {
    for (fx_i64 i = 0; i < k; ++i)
      for (int v = 0; v < VECTORS; ++v)
        put(to + i * PANEL + v * VL, get(b + i * k_stride + v * VL));
    return;
  }
  fx_i64 whole = 0, done = 0;  // columns and k's that go through registers
  if (k_stride == 1) {
    whole = columns / VL * VL, done = k / VL * VL;
    for (fx_i64 j = 0; j < whole; j += VL)
      for (fx_i64 i = 0; i < done; i += VL) {
        V row[VL];
        for (int v = 0; v < VL; ++v) row[v] = get(b + (j + v) * n_stride + i);
        transpose(row);
        for (int v = 0; v < VL; ++v) put(to + (i + v) * PANEL + j, row[v]);
      }
  }
  for (fx_i64 i = 0; i < k; ++i)
    for (fx_i64 j = i < done ? whole : 0; j < columns; ++j)
      to[i * PANEL + j] = widen(b[i * k_stride + j * n_stride]);
}

// ---- From sums to the output --------------------------------------------------------------------

struct Block {  // of the output
  fx_i64 outer, inner, row, rows, column, columns;
};

template <class O>
static inline void write_block(const FxProduct& p, const Block& at, const C* sums, fx_i64 pitch) {
  const C alpha = (C)p.alpha, beta = (C)p.beta;
  const fx_i64 batch = at.outer * p.inner + at.inner;
  for (fx_i64 r = 0; r < at.rows; ++r) {
    const C* __restrict from = sums + r * pitch;
    O* __restrict to = (O*)p.out + (batch * p.m + at.row + r) * p.n + at.column;
    const fx_i64 step = p.bias_stride[3];
    const C* bias = (const C*)p.bias;
    if (bias) {
      bias += at.outer * p.bias_stride[0] + at.inner * p.bias_stride[1];
      bias += (at.row + r) * p.bias_stride[2] + at.column * step;
    }
    auto write = [=](auto finished) {
      for (fx_i64 j = 0; j < at.columns; ++j) to[j] = stored<O>(finished(alpha * from[j], j));
    };
    if (p.divisor) {
      const C by = ((const C*)p.divisor)[batch * p.m + at.row + r];
      write([=](C sum, fx_i64) { return (sum + (C)0) / by; });
    } else if (!bias) {
      write([=](C sum, fx_i64) { return sum + (C)0; });  // -0 becomes 0
    } else if (step == 1) {
      write([=](C sum, fx_i64 j) { return sum + beta * bias[j]; });
    } else {
      write([=](C sum, fx_i64 j) { return sum + beta * bias[j * step]; });
    }
  }
}

static inline void write_out(const FxProduct& p, const Block& at, const C* sums, fx_i64 pitch) {
  if constexpr (sizeof(C) == 8) {
    write_block<f64>(p, at, sums, pitch);
  } else {
    if (p.out_type == BF16) return write_block<bf16>(p, at, sums, pitch);
    if (p.out_type == F16) return write_block<f16>(p, at, sums, pitch);
    write_block<f32>(p, at, sums, pitch);
  }
}

static inline const Element* b_at(const FxProduct& p, const Block& at, fx_i64 k) {
  return (const Element*)p.b + at.outer * p.b_stride[0] + at.inner * p.b_stride[1] +
         k * p.b_stride[2] + at.column * p.b_stride[3];
}

static inline fx_i64 a_at(const FxProduct& p, const Block& at, fx_i64 row, fx_i64 k) {
  return at.outer * p.a_stride[0] + at.inner * p.a_stride[1] + (at.row + row) * p.a_stride[2] +
         k * p.a_stride[3];
}
