// The CUDA row kernel, as a template over a generated `Spec` (kernels/cuda_source.py), compiled
// by NVRTC with --fmad=false: every operation below rounds once, as written. No header is needed.
//
// FX_HIDDEN, FX_LANES   the row and its reduction tree (kernels/gpu_rows.py)
// FX_THREADS            threads of a row: a power of two, at most FX_LANES / 8
// FX_ROWS               rows of a block
//
// A thread owns units of 8 consecutive elements: units t, t + FX_THREADS, ... of every chunk of
// FX_LANES elements, with one accumulator per lane. So any FX_THREADS gives the same bits.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
typedef float f32;
struct none {};

#define FX_INLINE_MEMBER __device__ __forceinline__
#define FX_INLINE static __device__ __forceinline__

// ---- Roundings ----------------------------------------------------------------------------------

FX_INLINE float widen(float v) { return v; }
FX_INLINE float widen(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
FX_INLINE float widen(f16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

template <class T>
FX_INLINE T narrow(float v);
template <>
__device__ __forceinline__ f32 narrow<f32>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float v) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bf16{bits};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float v) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return f16{bits};
}

template <class T>
FX_INLINE float rounded(float v) {
  return widen(narrow<T>(v));
}

// ---- Eight elements at a time -------------------------------------------------------------------

template <class T>
struct alignas(16) Unit {
  T v[8];
};
template <>
struct Unit<none> {};

// Plain loads: the read-only path may be read ahead of griddepcontrol.wait.
template <bool WIDE, class T>
FX_INLINE Unit<T> load(const T* row, int i) {
  Unit<T> unit;
  if constexpr (WIDE) {
    const uint4* from = (const uint4*)(row + i);
    uint4* to = (uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k) to[k] = from[k];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) unit.v[j] = i + j < FX_HIDDEN ? row[i + j] : narrow<T>(0.0f);
  }
  return unit;
}

template <bool WIDE, class T>
FX_INLINE void store(T* row, int i, const Unit<T>& unit) {
  if constexpr (WIDE) {
    uint4* to = (uint4*)(row + i);
    const uint4* from = (const uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k) to[k] = from[k];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < FX_HIDDEN) row[i + j] = unit.v[j];
  }
}

// ---- One launch ---------------------------------------------------------------------------------

struct FxArgs {
  const void *x, *residual, *weight, *bias;
  void *out, *sum, *row;
  i64 rows, inner, x_outer, x_step, residual_outer, residual_step, weight_rows, bias_rows;
  float eps;
  u32 wide;  // every row of every tensor starts at a multiple of 16 bytes
};

enum {
  UNITS = FX_LANES / 8,            // of a chunk
  MINE = UNITS / FX_THREADS,       // of them, one thread's
  CHUNKS = (FX_HIDDEN + FX_LANES - 1) / FX_LANES,
  WARPS = FX_THREADS < 32 ? 1 : FX_THREADS / 32,  // of a row
  PARTIALS = MINE * WARPS,
};

FX_INLINE int first_element(int chunk, int mine, int t) {
  return chunk * FX_LANES + (mine * FX_THREADS + t) * 8;
}

FX_INLINE i64 offset_of(u32 r, i64 inner, i64 outer, i64 step) {
  // Most tensors have one row stride: a 64-bit division would cost them more than the load.
  if (r < inner) return (i64)r * step;
  u32 q = r / (u32)inner;
  return (i64)q * outer + (i64)(r - q * (u32)inner) * step;
}

// Neighbours first: values j and j + 1, then pairs of pairs, up to the top.
template <int COUNT>
FX_INLINE float tree(const float* value) {
  float half[COUNT / 2];
#pragma unroll
  for (int j = 0; j < COUNT / 2; ++j) half[j] = value[2 * j] + value[2 * j + 1];
  return tree<COUNT / 2>(half);
}
template <>
__device__ __forceinline__ float tree<1>(const float* value) {
  return value[0];
}

template <class S, bool WIDE>
struct Row {
  typedef typename S::X X;
  typedef typename S::Residual Residual;
  typedef typename S::Weight Weight;
  typedef typename S::Bias Bias;
  typedef typename S::Out Out;
  // What is normalised: the rounded sum, or x itself.
  template <bool R, class A, class B>
  struct Pick {
    typedef A type;
  };
  template <class A, class B>
  struct Pick<true, A, B> {
    typedef B type;
  };
  typedef typename Pick<S::has_residual, X, typename S::Sum>::type Normed;
  // Rows too long for the registers are read twice.
  static constexpr bool kept = MINE * CHUNKS * (int)sizeof(Unit<Normed>) <= FX_KEPT_BYTES;

  const X* x;
  const Residual* residual;
  Normed* sum;
  const Weight* weight;
  const Bias* bias;
  Out* out;

  FX_INLINE Row at(const FxArgs& a, u32 r) {
    Row row;
    row.x = (const X*)a.x + offset_of(r, a.inner, a.x_outer, a.x_step);
    if constexpr (S::has_residual)
      row.residual = (const Residual*)a.residual +
                     offset_of(r, a.inner, a.residual_outer, a.residual_step);
    if constexpr (S::writes_sum) row.sum = (Normed*)a.sum + (i64)r * FX_HIDDEN;
    if constexpr (S::has_weight)
      row.weight = (const Weight*)a.weight +
                   (a.weight_rows > 1 ? (i64)(r % (u32)a.weight_rows) * FX_HIDDEN : 0);
    if constexpr (S::has_bias)
      row.bias = (const Bias*)a.bias +
                 (a.bias_rows > 1 ? (i64)(r % (u32)a.bias_rows) * FX_HIDDEN : 0);
    row.out = (Out*)a.out + (i64)r * FX_HIDDEN;
    return row;
  }

  FX_INLINE_MEMBER Unit<Normed> normed(int i, bool write) const {
    if constexpr (!S::has_residual) {
      return load<WIDE>(x, i);
    } else {
      Unit<X> a = load<WIDE>(x, i);
      Unit<Residual> b = load<WIDE>(residual, i);
      Unit<Normed> total;
#pragma unroll
      for (int j = 0; j < 8; ++j) total.v[j] = narrow<Normed>(widen(a.v[j]) + widen(b.v[j]));
      if constexpr (S::writes_sum)
        if (write) store<WIDE>(sum, i, total);
      return total;
    }
  }

  FX_INLINE_MEMBER void write(int i, const Unit<Normed>& unit, const Unit<Weight>& w, float scale)
      const {
    Unit<Out> result;
    Unit<Bias> b;
    if constexpr (S::has_bias) b = load<WIDE>(bias, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float factor = 0.0f, shift = 0.0f;
      if constexpr (S::has_weight) factor = S::factor(widen(w.v[j]));
      if constexpr (S::has_bias) shift = widen(b.v[j]);
      result.v[j] = narrow<Out>(S::element(widen(unit.v[j]), scale, factor, shift));
    }
    store<WIDE>(out, i, result);
  }
};

template <class S, class T>
FX_INLINE void add_squares(const Unit<T>& unit, float* lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float v = widen(unit.v[j]);
    if constexpr (S::exact_square) {
      lane[j] = __fmaf_rn(v, v, lane[j]);
    } else {
      lane[j] = lane[j] + S::square(v);
    }
  }
}

// The sum over the lanes of one row; every thread of the row gets it.
FX_INLINE float row_sum(float (*lane)[8], int t, int row_of_block) {
  float partial[MINE];
#pragma unroll
  for (int m = 0; m < MINE; ++m) {
    partial[m] = tree<8>(lane[m]);
#pragma unroll
    for (int distance = 1; distance < (FX_THREADS < 32 ? FX_THREADS : 32); distance *= 2)
      partial[m] = partial[m] + __shfl_xor_sync(0xffffffffu, partial[m], distance);
  }
  if constexpr (WARPS == 1) {
    return tree<MINE>(partial);
  } else {
    __shared__ alignas(16) float shared[FX_ROWS][PARTIALS];
    if (t % 32 == 0) {
#pragma unroll
      for (int m = 0; m < MINE; ++m) shared[row_of_block][m * WARPS + t / 32] = partial[m];
    }
    __syncthreads();
    float all[PARTIALS];
#pragma unroll
    for (int p = 0; p < PARTIALS; ++p) all[p] = shared[row_of_block][p];
    return tree<PARTIALS>(all);
  }
}

template <class S, bool WIDE>
FX_INLINE void run(const FxArgs& a) {
  typedef Row<S, WIDE> Here;
  typedef typename Here::Normed Normed;
  const int t = threadIdx.x % FX_THREADS, row_of_block = threadIdx.x / FX_THREADS;
  const u32 r = blockIdx.x * (u32)FX_ROWS + row_of_block;
  const bool active = r < a.rows;  // the others only take part in the shuffles and barriers
  const Here row = Here::at(a, active ? r : 0);
#if __CUDA_ARCH__ >= 900
  // Launched while the kernel before still runs: nothing it wrote may be read earlier.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  Unit<Normed> held[Here::kept ? CHUNKS : 1][MINE];
  float lane[MINE][8] = {};
#pragma unroll Here::kept ? CHUNKS : 1
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int m = 0; m < MINE; ++m) {
      const int i = first_element(c, m, t);
      if (active && i < FX_HIDDEN) {
        Unit<Normed> unit = row.normed(i, true);
        if constexpr (Here::kept) held[c][m] = unit;
        else add_squares<S>(unit, lane[m]);
      }
    }
  }
  if constexpr (Here::kept) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m)
        if (active && first_element(c, m, t) < FX_HIDDEN) add_squares<S>(held[c][m], lane[m]);
  }
  const float squares = row_sum(lane, t, row_of_block);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (!active) return;
  const float scale =
      S::row(squares, (float)FX_HIDDEN, (float)(1.0 / (double)FX_HIDDEN), a.eps);
  if constexpr (S::writes_row)
    if (t == 0) ((typename S::RowValue*)a.row)[r] = narrow<typename S::RowValue>(scale);
#pragma unroll Here::kept ? CHUNKS : 1
  for (int c = 0; c < CHUNKS; ++c) {
    // Stores may alias the weight as far as the compiler knows: all its loads come first.
    Unit<typename S::Weight> w[MINE];
    if constexpr (S::has_weight) {
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int i = first_element(c, m, t);
        if (i < FX_HIDDEN) w[m] = load<WIDE>(row.weight, i);
      }
    }
#pragma unroll
    for (int m = 0; m < MINE; ++m) {
      const int i = first_element(c, m, t);
      if (i >= FX_HIDDEN) continue;
      if constexpr (Here::kept) row.write(i, held[c][m], w[m], scale);
      else row.write(i, row.normed(i, false), w[m], scale);
    }
  }
}

template <class S>
FX_INLINE void run_rows(const FxArgs& a) {
  if (FX_HIDDEN % 8 == 0 && a.wide) run<S, true>(a);
  else run<S, false>(a);
}
