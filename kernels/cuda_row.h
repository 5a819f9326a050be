// The CUDA row kernel, as a template over a generated `Spec` (kernels/cuda_source.py), compiled
// by NVRTC with --fmad=false: every operation below rounds once, as written. Comes after
// cuda_pairs.h, cuda_lanes.h and cuda_units.h; no other header is needed.
//
// FX_HIDDEN, FX_LANES   the row and its reduction tree (kernels/gpu_rows.py)
// FX_THREADS            threads of a row: a multiple of 32, or a power of two below
// FX_ROWS               rows of a block
// FX_BLOCKS             blocks of a row, a cluster of them (compute capability 9.0), or 1
// FX_SEGMENT            units of 8 elements of a chunk that one of these blocks takes
// FX_RELEASE            when the next kernel may be launched: 0 at once, 1 when the loads are on their
//                       way, 2 when the row is summed, 3 when it is stored
// FX_WEIGHT             when it is loaded: 0 with x, 1 before threads add up, 2 after
// FX_AGAIN              whether elements are widened again after the sum, not kept widened
// FX_KEPT_BYTES         most of a row that a thread keeps in registers
// FX_LAST               whether the L2 is to evict x and the residual last

// ---- One launch ---------------------------------------------------------------------------------

// The first two lines of 64 bytes, up to the residual's skip, are all that most norms read: every
// launch waits for the lines it reads (32 rows of 128: 0.77 us with three, 0.73 with two).
struct FxArgs {
  const void *x, *residual, *weight, *bias;
  void *out, *sum, *row;
  i64 x_step, x_skip;  // row r starts at r * step + r / inner * skip
  u32 rows;
  u32 wide;  // every row of every tensor starts at a multiple of 16 bytes
  u32 inner_factor, inner_shift;
  u32 inner, weight_rows, bias_rows;
  float eps;
  i64 residual_step, residual_skip;
  u32 weight_factor, weight_shift, bias_factor, bias_shift;
};

// r / n * skip for r below 2^31, by what divisor() of cuda_call.py made of n.
FX_INLINE i64 skipped(u32 r, u32 factor, u32 shift, i64 skip) {
  return (i64)(__umulhi(r, factor) >> shift) * skip;
}

// Inside a condition out of line, or its instructions run in any case, and all loads wait for them.
static __device__ __noinline__ i64 skipped_apart(u32 r, u32 factor, u32 shift, i64 skip) {
  return skipped(r, factor, shift, skip);
}

// Worked out before the kernel waits for the one before it, not when the address is needed; the
// assembler may leave its last addition behind the wait.
template <class T>
FX_INLINE T* settled(T* address) {
  size_t global = __cvta_generic_to_global(address);
  asm volatile("" : "+l"(global));
  return (T*)__cvta_global_to_generic(global);
}

// The same unit, but the compiler does not know: it then widens the elements again, where it would
// keep both forms in registers. (`wide` is 0 or 1, and known to be 0 where it makes no difference:
// without 16-byte accesses.)
template <class T>
FX_INLINE void forget(Unit<T>& unit, const FxArgs& a) {
#pragma unroll
  for (int k = 0; k < 4; ++k) unit.v[k].bits ^= a.wide >> 1;
}

// Where the weight of row r starts, of n that take turns.
FX_INLINE i64 weight_of(u32 r, u32 n, u32 factor, u32 shift) {
  return (i64)r * FX_HIDDEN + skipped_apart(r, factor, shift, -(i64)n * FX_HIDDEN);
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

  // At the thread's first element.
  const X* x;
  const Residual* residual;
  Normed* sum;
  const Weight* weight;
  const Bias* bias;
  Out* out;
  int own;

  FX_INLINE Row at(const FxArgs& a, u32 r, int own) {
    i64 x = (i64)r * a.x_step, residual = 0, weight = 0, bias = 0;
    if constexpr (S::has_residual) residual = (i64)r * a.residual_step;
    // Heads of q and k take this always, so that they wait no longer than rows of one stride (8
    // tokens of 32 heads: 0.78 us, and 0.88 behind a condition). It delays others (2,048 rows of 512
    // with a residual: 2.1 us for 1.9).
    constexpr bool always = FX_ROWS > 1 && FX_HIDDEN <= 256 && !S::has_residual;
    if constexpr (always) x += skipped(r, a.inner_factor, a.inner_shift, a.x_skip);
    // Most tensors have one stride and one weight: one branch for all that others need.
    u32 unusual = a.weight_rows;
    if constexpr (S::has_bias) unusual |= a.bias_rows;
    if constexpr (!always) unusual |= a.inner;
    if (unusual != 1) {
      if (!always && a.inner != 1) {
        x += skipped_apart(r, a.inner_factor, a.inner_shift, a.x_skip);
        if constexpr (S::has_residual)
          residual += skipped_apart(r, a.inner_factor, a.inner_shift, a.residual_skip);
      }
      if (a.weight_rows != 1)
        weight = weight_of(r, a.weight_rows, a.weight_factor, a.weight_shift);
      if constexpr (S::has_bias)
        if (a.bias_rows != 1) bias = weight_of(r, a.bias_rows, a.bias_factor, a.bias_shift);
    }
    Row row;
    row.own = own;
    row.x = settled((const X*)a.x + x + own);
    if constexpr (S::has_residual)
      row.residual = settled((const Residual*)a.residual + residual + own);
    if constexpr (S::writes_sum) row.sum = (Normed*)a.sum + (i64)r * FX_HIDDEN + own;
    if constexpr (S::has_weight) row.weight = settled((const Weight*)a.weight + weight + own);
    if constexpr (S::has_bias) row.bias = (const Bias*)a.bias + bias + own;
    row.out = (Out*)a.out + (i64)r * FX_HIDDEN + own;
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

  FX_INLINE_MEMBER void write(int place, const Unit<Normed>& unit, const Unit<Weight>& w,
                              float scale) const {
    Unit<Out> result;
    Unit<Bias> b;
    if constexpr (S::has_bias) b = load<WIDE>(bias + place, own + place);
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
    store<WIDE>(out + place, own + place, result);
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
  constexpr bool FORGET = FX_AGAIN && BATCH * MINE > 1 && sizeof(Unit<Normed>) == 16;
  const int row_of_block = FX_ROWS > 1 ? threadIdx.x / FX_THREADS : 0;
  const int t = threadIdx.x - row_of_block * FX_THREADS;
  const u32 r = blockIdx.x / FX_BLOCKS * (u32)FX_ROWS + row_of_block;
  // The others only take part in the shuffles and barriers.
  const bool active = FX_ROWS == 1 || r < a.rows;
  const Here row = Here::at(a, active ? r : 0, own_element(t));
#if FX_LAST
  const Policy policy = evict_last();
#else
  const none policy = {};
#endif
#if FX_BLOCKS > 1
  set_up(t == 0);
#endif
#if __CUDA_ARCH__ >= 900
  // Launched while the kernel before still runs: nothing it wrote may be read before the wait.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Before the wait it would let the kernel after the next one in as well: blocks that only wait
  // then crowd the multiprocessors (64 rows of 8192: 2.7 us for 1.7).
  if (FX_RELEASE == 0) asm volatile("griddepcontrol.launch_dependents;");
#endif
  Unit<Normed> held[BATCH][MINE];
  Weights w[BATCH][MINE];
  float lane[SPREAD] = {};  // more than MINE of them add +0

  auto load_weights = [&](int first) {
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int at = place(first + c, m);
        if constexpr (S::has_weight)
          if (active && has_unit(first + c, m, t))
            w[c][m] = load<WIDE>(row.weight + at, row.own + at);
      }
  };
  auto load_batch = [&](int first, bool sums) {
    if constexpr (S::writes_sum) {
      if (!sums) {  // again: x and residual may be written over by now
#pragma unroll
        for (int c = 0; c < BATCH; ++c)
#pragma unroll
          for (int m = 0; m < MINE; ++m) {
            const int at = place(first + c, m);
            if (active && has_unit(first + c, m, t))
              held[c][m] = load<WIDE>(row.sum + at, row.own + at);
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
        const int at = place(first + c, m);
        if (!active || !has_unit(first + c, m, t)) continue;
        x[c][m] = load<WIDE>(row.x + at, row.own + at, policy);
        if constexpr (S::has_residual)
          residual[c][m] = load<WIDE>(row.residual + at, row.own + at, policy);
      }
    if (WEIGHT == 0) load_weights(first);
#if __CUDA_ARCH__ >= 900
    // The assembler moves no load behind this. Elsewhere it puts the weight's behind the squares,
    // which wait for x.
    if (FX_RELEASE == 1 && first == 0 && sums)
      asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int at = place(first + c, m);
        if (!active || !has_unit(first + c, m, t)) continue;
        held[c][m] = row.normed(x[c][m], residual[c][m]);
        if constexpr (S::writes_sum)
          if (sums) store<WIDE>(row.sum + at, row.own + at, held[c][m]);
      }
  };

  for (int first = 0; first < CHUNKS; first += BATCH) {
    load_batch(first, true);
#pragma unroll
    for (int c = 0; c < BATCH; ++c)
#pragma unroll
      for (int m = 0; m < MINE; ++m)
        if (active && has_unit(first + c, m, t)) {
          const float squares = squares_of<S>(held[c][m]);
          lane[m] = first + c == 0 ? squares : lane[m] + squares;  // +0 added to it is itself
        }
  }
  if (WEIGHT == 1) load_weights(0);
  const float squares = row_sum(lane, t, row_of_block);
#if __CUDA_ARCH__ >= 900
  if (FX_RELEASE == 2) asm volatile("griddepcontrol.launch_dependents;");
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
        if (!has_unit(first + c, m, t)) continue;
        if constexpr (FORGET) forget(held[c][m], a);
        row.write(place(first + c, m), held[c][m], w[c][m], scale);
      }
  }
#if __CUDA_ARCH__ >= 900
  if (FX_RELEASE == 3) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <class S>
FX_INLINE void run_rows(const FxArgs& a) {
  if (FX_HIDDEN % 8 == 0 && a.wide) run<S, true>(a);
  else run<S, false>(a);
}
