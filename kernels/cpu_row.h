// The row kernel, as a template over a generated `Spec` (see kernels/cpu_source.py).
//
// No headers are included: <math.h> and <stdint.h> alone would double the compile time (0.06 s to
// 0.23 s). Every float operation is one IEEE operation (-ffp-contract=off), so the bits are the
// same with AVX-512, AVX2, SSE2 and NEON; the compiler vectorises the loops.
#pragma once

typedef __UINT16_TYPE__ u16;
typedef __UINT32_TYPE__ u32;

struct bf16 {
  enum { mantissa = 8 };
  u16 bits;
};
struct f16 {
  enum { mantissa = 11 };
  u16 bits;
};
typedef float f32;
struct none {};

static inline u32 bits_of(float v) {
  u32 bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}

static inline float float_of(u32 bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// ---- Loads: exact ---------------------------------------------------------------------------

static inline float widen(float v) { return v; }
static inline float widen(bf16 v) { return float_of((u32)v.bits << 16); }

static inline float widen(f16 v) {
  u32 twice = (u32)v.bits << 17;
  u32 sign = ((u32)v.bits & 0x8000u) << 16;
  float normal = float_of((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  float tiny = float_of((twice >> 17) | (126u << 23)) - 0.5f;  // subnormal f16
  // A mask, not ?: of the floats, which becomes a branch that keeps the loop scalar (4x slower).
  u32 is_tiny = 0u - (u32)(twice < (1u << 27));
  return float_of(sign | (bits_of(tiny) & is_tiny) | (bits_of(normal) & ~is_tiny));
}

// ---- Stores: one rounding, to nearest even; a NaN stays a NaN ----------------------------------

template <class T>
static inline T narrow(float v);

template <>
inline f32 narrow<f32>(float v) {
  return v;
}

// QUIET says that no NaN here can carry into the sign: then the NaN test, a quarter of the
// operations, is left out. True if every input is bf16, whose NaNs end in 16 zero bits.
static inline u32 bf16_rounded(float v) {
  u32 bits = bits_of(v);
  u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
#ifdef QUIET
  return rounded;
#else
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded;
#endif
}

template <>
inline bf16 narrow<bf16>(float v) {
  return bf16{(u16)(bf16_rounded(v) >> 16)};
}

template <>
inline f16 narrow<f16>(float v) {
  u32 bits = bits_of(v);
  u32 twice = bits + bits;
  float magnitude = float_of(bits & 0x7fffffffu);
  u32 exponent = twice & 0xff000000u;
  exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
  // The scaling sends what is too large to infinity; adding 2^exponent rounds the mantissa.
  float base = float_of((exponent >> 1) + 0x07800000u) + (magnitude * 0x1p+112f) * 0x1p-110f;
  u32 rounded = ((bits_of(base) >> 13) & 0x7c00u) + (bits_of(base) & 0x0fffu);
  return f16{(u16)(((bits >> 16) & 0x8000u) | (twice > 0xff000000u ? 0x7e00u : rounded))};
}

// A value rounded to T and kept in a float.
template <class T>
static inline float rounded(float v) {
  return widen(narrow<T>(v));
}
template <>
inline float rounded<bf16>(float v) {
  return float_of(bf16_rounded(v) & 0xffff0000u);
}

// ---- The reduction tree: fixed by hidden alone --------------------------------------------------

// Element i belongs to lane i % 64. Each lane adds its squares in order, in blocks of 4096 elements
// whose lane sums are then added in order; at the end lane j takes lane j + 32, then j + 16, ... 1.
// 64 lanes are 4 AVX-512 registers, enough to hide the latency of the add.
enum { LANES = 64, BLOCK = 4096 };

// Wider than the machine's registers is fine: the compiler splits it, lane by lane.
typedef float v16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

template <class Half, class Whole>
static inline Half folded(Whole whole) {
  Half half[2];
  __builtin_memcpy(half, &whole, sizeof(whole));
  return half[0] + half[1];
}

static inline float tree(const float* lane) {
  v16 part[4];
  __builtin_memcpy(part, lane, sizeof(part));
  v4 four = folded<v4>(folded<v8>((part[0] + part[2]) + (part[1] + part[3])));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// `groups(i, end, lane)` may add groups of 64 in its own way; it returns where it stopped.
template <class Groups, class Square>
static inline float sum_of_squares(fx_i64 hidden, Groups groups, Square square) {
  float total[LANES] = {};
  for (fx_i64 start = 0;; start += BLOCK) {
    fx_i64 end = start + BLOCK < hidden ? start + BLOCK : hidden;
    float lane[LANES] = {};
    fx_i64 i = groups(start, end, lane);
    for (; i + LANES <= end; i += LANES)
      for (int j = 0; j < LANES; ++j) lane[j] += square(i + j);
    for (int j = 0; j < (int)(end - i); ++j) lane[j] += square(i + j);
    if (hidden <= BLOCK) return tree(lane);  // 0 + lane would be the same bits
    for (int j = 0; j < LANES; ++j) total[j] += lane[j];
    if (end == hidden) return tree(total);
  }
}

// ---- One row ------------------------------------------------------------------------------------

static inline fx_i64 offset_of(const FxArgs& a, const fx_i64* stride, fx_i64 r) {
  fx_i64 offset = 0;
  for (fx_i64 d = a.dims - 1; d > 0; --d) {
    offset += (r % a.size[d]) * stride[d];
    r /= a.size[d];
  }
  return offset + r * stride[0];
}

template <class T>
static inline const T* weight_row(const void* base, fx_i64 rows, fx_i64 hidden, fx_i64 r) {
  return (const T*)base + (rows > 1 ? (r % rows) * hidden : 0);
}

// First pass: the row value (1/rms). Writes the residual sum if it is an output.
template <class S>
static inline float row_value(const FxArgs& a, fx_i64 r) {
  typedef typename S::Sum Sum;
  const fx_i64 hidden = a.hidden;
  const typename S::X* __restrict x = (const typename S::X*)a.x + offset_of(a, a.x_stride, r);
  const typename S::Residual* __restrict residual = nullptr;
  Sum* __restrict sum = nullptr;
  if constexpr (S::has_residual) {
    residual = (const typename S::Residual*)a.residual + offset_of(a, a.residual_stride, r);
    sum = (Sum*)a.sum + r * hidden;
  }
  auto groups = [=](fx_i64 i, fx_i64 end, float* lane) {
#ifdef F16_WIDE
    return add_squares16<S>(x, residual, sum, i, end, lane);
#else
    return i;
#endif
  };
  const float squares = sum_of_squares(hidden, groups, [=](fx_i64 i) {
    if constexpr (S::has_residual) {
      Sum total = narrow<Sum>(widen(x[i]) + widen(residual[i]));
      if constexpr (S::writes_sum) sum[i] = total;
      return S::square(widen(total));
    } else {
      return S::square(widen(x[i]));
    }
  });
  const float value = S::row(squares, (float)hidden, (float)(1.0 / (double)hidden), (float)a.eps);
  if constexpr (S::writes_row) {
    ((typename S::RowValue*)a.row)[r] = narrow<typename S::RowValue>(value);
  }
  return value;
}

static inline u32 pair_at(const void* p, fx_i64 i) {
  u32 pair;
  __builtin_memcpy(&pair, (const char*)p + 4 * i, sizeof(pair));
  return pair;
}

// Two bf16 of one 32-bit word are widened by a shift and a mask, and packed by another two; as
// 16-bit elements they would have to be spread over two registers and collected again.
template <class S>
static inline void write_pairs(const void* __restrict x, const void* __restrict weight,
                               const void* __restrict bias, void* __restrict out, fx_i64 pairs,
                               float scale) {
  for (fx_i64 i = 0; i < pairs; ++i) {
    u32 value = pair_at(x, i), factor = 0, shift = 0;
    if constexpr (S::has_weight) factor = pair_at(weight, i);
    if constexpr (S::has_bias) shift = pair_at(bias, i);
    float low = S::element(float_of(value << 16), scale, S::factor(float_of(factor << 16)),
                           float_of(shift << 16));
    float high = S::element(float_of(value & 0xffff0000u), scale,
                            S::factor(float_of(factor & 0xffff0000u)),
                            float_of(shift & 0xffff0000u));
    u32 both = (bf16_rounded(low) >> 16) | (bf16_rounded(high) & 0xffff0000u);
    __builtin_memcpy((char*)out + 4 * i, &both, sizeof(both));
  }
}

// Second pass, over a row that the first one left in the nearest caches.
template <class S>
static inline void write_row(const FxArgs& a, fx_i64 r, float scale) {
  typedef typename S::Sum Sum;
  const fx_i64 hidden = a.hidden;
  const typename S::X* __restrict x = (const typename S::X*)a.x + offset_of(a, a.x_stride, r);
  const auto* __restrict weight =
      weight_row<typename S::Weight>(a.weight, a.weight_rows, hidden, r);
  const auto* __restrict bias = weight_row<typename S::Bias>(a.bias, a.bias_rows, hidden, r);
  typename S::Out* __restrict out = (typename S::Out*)a.out + r * hidden;
  const Sum* __restrict sum = nullptr;
  const typename S::Residual* __restrict residual = nullptr;
  if constexpr (S::has_residual) {
    sum = (const Sum*)a.sum + r * hidden;
    residual = (const typename S::Residual*)a.residual + offset_of(a, a.residual_stride, r);
  }
  fx_i64 done = 0;
  if constexpr (S::pairs) {
    const void* normed = S::has_residual ? (const void*)sum : (const void*)x;
    done = hidden & ~(fx_i64)1;
    write_pairs<S>(normed, weight, bias, out, done / 2, scale);
  }
#ifdef F16_WIDE
  done = write16<S>(x, residual, (Sum*)sum, weight, bias, out, hidden, scale);
#endif
  for (fx_i64 i = done; i < hidden; ++i) {
    float value;
    if constexpr (!S::has_residual) {
      value = widen(x[i]);
    } else if constexpr (S::writes_sum) {
      value = widen(sum[i]);
    } else {
      value = rounded<Sum>(widen(x[i]) + widen(residual[i]));
    }
    float factor = 0.0f, shift = 0.0f;
    if constexpr (S::has_weight) factor = S::factor(widen(weight[i]));
    if constexpr (S::has_bias) shift = widen(bias[i]);
    out[i] = narrow<typename S::Out>(S::element(value, scale, factor, shift));
  }
}

// Short rows go in fours: the long chain from the sum to 1/rms of one overlaps the others.
enum { GROUP = 4, SHORT = 1024 };

template <class S>
static inline void run_group(const FxArgs& a, fx_i64 first, fx_i64 group) {
  const int count = (int)(first + group <= a.rows ? group : a.rows - first);
  float scale[GROUP];
  for (int k = 0; k < count; ++k) scale[k] = row_value<S>(a, first + k);
  for (int k = 0; k < count; ++k) write_row<S>(a, first + k, scale[k]);
}

// Rows are independent, so their grouping and their division among threads change no bit.
template <class S>
static void run_rows(const FxArgs& a) {
  const fx_i64 group = a.hidden <= SHORT ? GROUP : 1;
#ifdef _OPENMP
  if (a.threads > 1) {  // entering a parallel region costs 0.6 us even with one thread
#pragma omp parallel for schedule(static) num_threads((int)a.threads)
    for (fx_i64 first = 0; first < a.rows; first += group) run_group<S>(a, first, group);
    return;
  }
#endif
  for (fx_i64 first = 0; first < a.rows; first += group) run_group<S>(a, first, group);
}
