// The CUDA row kernel, as a template over a generated `Spec` (kernels/cuda_source.py), compiled
// by NVRTC with --fmad=false: every operation below rounds once, as written. Comes after
// cuda_pairs.h and cuda_lanes.h; no other header is needed.
//
// FX_HIDDEN, FX_LANES   the row and its reduction tree (kernels/gpu_rows.py)
// FX_THREADS            threads of a row: a multiple of 32, or a power of two below
// FX_ROWS               rows of a block
// FX_BLOCKS             blocks of a row, a cluster of them (compute capability 9.0), or 1
// FX_SEGMENT            units of 8 elements of a chunk that one of these blocks takes
// FX_EAGER              whether the next kernel may be launched at once
// FX_WEIGHT             when it is loaded: 0 with x, 1 before threads add up, 2 after
// FX_KEPT_BYTES         most of a row that a thread keeps in registers

// ---- Eight elements at a time -------------------------------------------------------------------

template <class T>
struct alignas(16) Unit {
  Two<T> v[4];
};
template <>
struct Unit<none> {
  Two<none> v[4];
};

// Spelt out, so that the compiler keeps their order: it put the weight's behind the row's sum. (The
// assembler may still move one, but none ahead of griddepcontrol.wait.)
template <bool WIDE, class T>
FX_INLINE Unit<T> load(const T* row, int i) {
  Unit<T> unit;
  if constexpr (WIDE) {
    const uint4* from = (const uint4*)(row + i);
    uint4* to = (uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k)
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[k].x), "=r"(to[k].y), "=r"(to[k].z), "=r"(to[k].w)
                   : "l"(from + k) : "memory");
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) ((T*)&unit)[j] = i + j < FX_HIDDEN ? row[i + j] : T{};
  }
  return unit;
}

template <bool WIDE, class T>
FX_INLINE void store(T* row, int i, const Unit<T>& unit) {
  if constexpr (WIDE) {
    uint4* to = (uint4*)(row + i);
    const uint4* from = (const uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + k), "r"(from[k].x),
                   "r"(from[k].y), "r"(from[k].z), "r"(from[k].w) : "memory");
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < FX_HIDDEN) row[i + j] = ((const T*)&unit)[j];
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

FX_INLINE i64 offset_of(u32 r, i64 inner, i64 outer, i64 step) {
  if (inner == 1) return (i64)r * outer;  // most tensors: a division would delay the load
  u32 q = r / (u32)inner;
  return (i64)q * outer + (i64)(r - q * (u32)inner) * step;
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

  FX_INLINE_MEMBER Unit<Normed> normed(const Unit<X>& a, const Unit<Residual>& b) const {
    if constexpr (!S::has_residual) {
      return a;
    } else {
      Unit<Normed> total;
#pragma unroll
      for (int j = 0; j < 4; ++j) total.v[j] = Two<Normed>::narrow(a.v[j].widen() + b.v[j].widen());
      return total;
    }
  }

  FX_INLINE_MEMBER void write(int i, const Unit<Normed>& unit, const Unit<Weight>& w, float scale)
      const {
    Unit<Out> result;
    Unit<Bias> b;
    if constexpr (S::has_bias) b = load<WIDE>(bias, i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const pair v = unit.v[j].widen();
      if constexpr (S::ends_in_product) {
        result.v[j] = Two<Out>::product(Two<Out>::narrow(S::unscaled(v, scale)), w.v[j]);
      } else {
        pair factor = {}, shift = {};
        if constexpr (S::has_weight) factor = S::factor(w.v[j].widen());
        if constexpr (S::has_bias) shift = b.v[j].widen();
        result.v[j] = Two<Out>::narrow(S::element(v, scale, factor, shift));
      }
    }
    store<WIDE>(out, i, result);
  }
};

// The squares of eight elements, nearest first.
template <class S, class T>
FX_INLINE float squares_of(const Unit<T>& unit) {
  float two[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const pair v = unit.v[j].widen();
    if constexpr (S::exact_square) {
      two[j] = __fmaf_rn(v.hi, v.hi, v.lo * v.lo);
    } else {
      const pair square = S::square(v);
      two[j] = square.lo + square.hi;
    }
  }
  return (two[0] + two[1]) + (two[2] + two[3]);
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class S, bool WIDE>
FX_INLINE void run(const FxArgs& a) {
  typedef Row<S, WIDE> Here;
  typedef typename Here::Normed Normed;
  typedef Unit<typename S::Weight> Weights;
  // Stores may alias the inputs as far as the compiler knows, so each batch loads before it stores.
  constexpr int BATCH = Here::kept ? CHUNKS : 1;
  constexpr int WEIGHT = Here::kept ? FX_WEIGHT : 2;
  const int t = threadIdx.x % FX_THREADS, row_of_block = threadIdx.x / FX_THREADS;
  const u32 r = blockIdx.x / FX_BLOCKS * (u32)FX_ROWS + row_of_block;
  const bool active = r < a.rows;  // the others only take part in the shuffles and barriers
  const Here row = Here::at(a, active ? r : 0);
#if FX_BLOCKS > 1
  set_up(t == 0);
#endif
#if __CUDA_ARCH__ >= 900
  // Launched while the kernel before still runs: nothing it wrote may be read before the wait.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Before the wait it would let the kernel after the next one in as well: blocks that only wait
  // then crowd the multiprocessors (64 rows of 8192: 2.7 us for 1.7).
  if (FX_EAGER) asm volatile("griddepcontrol.launch_dependents;");
#endif
  Unit<Normed> held[BATCH][MINE];
  Weights w[BATCH][MINE];
  float lane[SPREAD] = {};  // more than MINE of them add +0

  auto load_weights = [&](int first) {
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int i = first_element(first + c, m, t);
        if constexpr (S::has_weight)
          if (active && i < FX_HIDDEN) w[c][m] = load<WIDE>(row.weight, i);
      }
  };
  auto load_batch = [&](int first, bool sums) {
    if constexpr (S::writes_sum) {
      if (!sums) {  // again: x and residual may be written over by now
#pragma unroll
        for (int c = 0; c < BATCH; ++c)
#pragma unroll
          for (int m = 0; m < MINE; ++m) {
            const int i = first_element(first + c, m, t);
            if (active && i < FX_HIDDEN) held[c][m] = load<WIDE>(row.sum, i);
          }
        return;
      }
    }
    Unit<typename S::X> x[BATCH][MINE];
    Unit<typename S::Residual> residual[BATCH][MINE];
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int i = first_element(first + c, m, t);
        if (!active || i >= FX_HIDDEN) continue;
        x[c][m] = load<WIDE>(row.x, i);
        if constexpr (S::has_residual) residual[c][m] = load<WIDE>(row.residual, i);
      }
    if (WEIGHT == 0) load_weights(first);
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int i = first_element(first + c, m, t);
        if (!active || i >= FX_HIDDEN) continue;
        held[c][m] = row.normed(x[c][m], residual[c][m]);
        if constexpr (S::writes_sum)
          if (sums) store<WIDE>(row.sum, i, held[c][m]);
      }
  };

  for (int first = 0; first < CHUNKS; first += BATCH) {
    load_batch(first, true);
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m)
        if (active && first_element(first + c, m, t) < FX_HIDDEN)
          lane[m] = lane[m] + squares_of<S>(held[c][m]);
  }
  if (WEIGHT == 1) load_weights(0);
  const float squares = row_sum(lane, t, row_of_block);
#if __CUDA_ARCH__ >= 900
  if (!FX_EAGER) asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (!active) return;
  const float scale = S::row(squares, (float)FX_HIDDEN, (float)(1.0 / (double)FX_HIDDEN), a.eps);
  if constexpr (S::writes_row)
    if (t == 0 && block_of_row() == 0) store_one((typename S::RowValue*)a.row + r, scale);
  for (int first = 0; first < CHUNKS; first += BATCH) {
    if constexpr (!Here::kept) load_batch(first, false);
    if (WEIGHT == 2) load_weights(first);
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int i = first_element(first + c, m, t);
        if (i < FX_HIDDEN) row.write(i, held[c][m], w[c][m], scale);
      }
  }
}

template <class S>
FX_INLINE void run_rows(const FxArgs& a) {
  if (FX_HIDDEN % 8 == 0 && a.wide) run<S, true>(a);
  else run<S, false>(a);
}
