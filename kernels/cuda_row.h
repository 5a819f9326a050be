// The CUDA row kernel, as a template over a generated `Spec` (kernels/cuda_source.py), compiled
// by NVRTC with --fmad=false: every operation below rounds once, as written. No header is needed.
//
// FX_HIDDEN, FX_LANES   the row and its reduction tree (kernels/gpu_rows.py)
// FX_THREADS            threads of a row: a multiple of 32, or a power of two below
// FX_ROWS               rows of a block
// FX_BLOCKS             blocks of a row, a cluster of them (compute capability 9.0), or 1
// FX_SEGMENT            units of 8 elements of a chunk that one of these blocks takes
// FX_EAGER              whether the next kernel may be launched at once
// FX_WEIGHT             when it is loaded: 0 with x, 1 before threads add up, 2 after
// FX_STREAM             whether x, residual and what is written leave the caches first
// FX_DIRECT             most partial sums that every thread adds by itself
// FX_KEPT_BYTES         most of a row that a thread keeps in registers
//
// A thread owns units of 8 consecutive elements: units t, t + FX_THREADS, ... of its block's segment
// of every chunk of FX_LANES elements, with one accumulator per unit. So any FX_THREADS and
// FX_BLOCKS give the same bits.

// ---- Eight elements at a time -------------------------------------------------------------------

template <class T>
struct alignas(16) Unit {
  Two<T> v[4];
};
template <>
struct Unit<none> {
  Two<none> v[4];
};

// Spelt out, so that they stay where they are written: no compiler moves the weight's behind the
// sum, or any ahead of griddepcontrol.wait.
#define FX_LOAD(HOW, to, from)                                        \
  asm volatile("ld.global" HOW ".v4.u32 {%0, %1, %2, %3}, [%4];"      \
               : "=r"((to).x), "=r"((to).y), "=r"((to).z), "=r"((to).w) \
               : "l"(from) : "memory")
#define FX_STORE(HOW, to, from)                                       \
  asm volatile("st.global" HOW ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"((from).x), \
               "r"((from).y), "r"((from).z), "r"((from).w) : "memory")

template <bool WIDE, bool STREAM, class T>
FX_INLINE Unit<T> load(const T* row, int i) {
  Unit<T> unit;
  if constexpr (WIDE) {
    const uint4* from = (const uint4*)(row + i);
    uint4* to = (uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k) {
      if constexpr (STREAM) FX_LOAD(".cs", to[k], from + k);
      else FX_LOAD("", to[k], from + k);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      ((T*)&unit)[j] = i + j < FX_HIDDEN ? row[i + j] : T{};
  }
  return unit;
}

template <bool WIDE, bool STREAM, class T>
FX_INLINE void store(T* row, int i, const Unit<T>& unit) {
  if constexpr (WIDE) {
    uint4* to = (uint4*)(row + i);
    const uint4* from = (const uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k) {
      if constexpr (STREAM) FX_STORE(".cs", to + k, from[k]);
      else FX_STORE("", to + k, from[k]);
    }
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

// The least power of two from n on.
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

enum {
  CHUNKS = (FX_HIDDEN + FX_LANES - 1) / FX_LANES,
  UNITS = CHUNKS > 1 ? FX_LANES / 8 : (FX_HIDDEN + 7) / 8,  // of a chunk
  SEGMENT = FX_BLOCKS > 1 ? FX_SEGMENT : UNITS,             // of them, at most, one block's
  MINE = (SEGMENT + FX_THREADS - 1) / FX_THREADS,           // of them, at most, one thread's
  WARPS = FX_THREADS < 32 ? 1 : FX_THREADS / 32,            // of a row in one block
  PARTIALS = FX_BLOCKS * MINE * WARPS,
  LANES = FX_THREADS < 32 ? FX_THREADS : 32,  // threads of a row in one warp
  SPREAD = power_of_two(MINE),
};
static_assert(PARTIALS <= 32, "the last step of the tree is one warp's");
static_assert(SPREAD <= LANES && FX_BLOCKS * SPREAD <= 32, "a value for every thread at most");
static_assert(FX_BLOCKS == 1 || (FX_ROWS == 1 && FX_BLOCKS * SEGMENT >= UNITS),
              "one row, all of it");
static_assert(FX_BLOCKS == 1 || (FX_THREADS % 32 == 0 && SEGMENT % FX_THREADS == 0 &&
                                 (SEGMENT & (SEGMENT - 1)) == 0),
              "a segment is a subtree");

// Which block of the row's this one is.
FX_INLINE int block_of_row() { return FX_BLOCKS > 1 ? blockIdx.x % FX_BLOCKS : 0; }

// First element of a thread's unit, or FX_HIDDEN if there is no such unit.
FX_INLINE int first_element(int chunk, int mine, int t) {
  const int unit = block_of_row() * SEGMENT + mine * FX_THREADS + t;
  const int i = chunk * FX_LANES + unit * 8;
  return unit < UNITS && i < FX_HIDDEN ? i : FX_HIDDEN;
}

FX_INLINE i64 offset_of(u32 r, i64 inner, i64 outer, i64 step) {
  if (inner == 1) return (i64)r * outer;  // most tensors: a division would delay the load
  u32 q = r / (u32)inner;
  return (i64)q * outer + (i64)(r - q * (u32)inner) * step;
}

// Neighbours first: values j and j + 1, then pairs of pairs, up to the top.
template <int COUNT>
FX_INLINE float tree(const float* value) {
  float half[(COUNT + 1) / 2];
#pragma unroll
  for (int j = 0; j < COUNT / 2; ++j) half[j] = value[2 * j] + value[2 * j + 1];
  if (COUNT % 2) half[COUNT / 2] = value[COUNT - 1];  // its neighbour is a sum of nothing
  return tree<(COUNT + 1) / 2>(half);
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
    if constexpr (S::has_bias) b = load<WIDE, false>(bias, i);
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
    store<WIDE, FX_STREAM>(out, i, result);
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

// ---- Between the blocks of a row ----------------------------------------------------------------

// Partial sums go straight into the shared memory of the other blocks and count bytes there. A
// cluster's barrier would do too, but wait for the stores of the sum (0.1 us).
#if FX_BLOCKS > 1
__shared__ u64 received;

FX_INLINE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// The same place in another block of the row.
FX_INLINE u32 address_in(int block, const void* at) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(block));
  return there;
}

// Before any block sends, every block has to have set up its count.
FX_INLINE void set_up(bool first) {
  if (first) {
    const u32 at = shared_address(&received);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
FX_INLINE void until_all_set_up() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
FX_INLINE void expect(int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&received)), "r"(bytes) : "memory");
}
FX_INLINE void send(int block, float* to, float value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in(block, to)), "r"(__float_as_uint(value)),
               "r"(address_in(block, &received)) : "memory");
}
FX_INLINE void receive() {
  u32 done;
  do {
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(&received)) : "memory");
  } while (!done);
}
#endif

// Each of COUNT values summed over the LANES threads of a row in a warp, neighbours first. A thread
// holds the sum of value t % SPREAD: threads `distance` apart give each other every second value
// and keep the rest, so that MINE = 4 takes 6 shuffles where four sums apart would take 20.
template <int COUNT>
FX_INLINE float lane_sums(const float* value, int distance) {
  float half[COUNT / 2];
  const bool odd = threadIdx.x & distance;
#pragma unroll
  for (int j = 0; j < COUNT / 2; ++j) {
    const float one = value[2 * j], two = value[2 * j + 1];
    half[j] = (odd ? two : one) + __shfl_xor_sync(0xffffffffu, odd ? one : two, distance);
  }
  return lane_sums<COUNT / 2>(half, 2 * distance);
}
template <>
__device__ __forceinline__ float lane_sums<1>(const float* value, int distance) {
  float sum = *value;
#pragma unroll
  for (int k = 1; k < LANES; k *= 2)
    if (k >= distance) sum = sum + __shfl_xor_sync(0xffffffffu, sum, k);
  return sum;
}

// The sum over the lanes of one row; every thread of the row gets it.
FX_INLINE float row_sum(const float* lane, int t, int row_of_block) {
  float mine = lane_sums<SPREAD>(lane, 1);
  if constexpr (PARTIALS == MINE) {
#pragma unroll
    for (int distance = 1; distance < SPREAD; distance *= 2)
      mine = mine + __shfl_xor_sync(0xffffffffu, mine, distance);
    return mine;
  }
  __shared__ alignas(16) float shared[FX_ROWS][32];
  const int m = t % SPREAD, first = block_of_row() * MINE * WARPS + t / 32;
#if FX_BLOCKS > 1
  until_all_set_up();
  if (t == 0) expect(PARTIALS * (int)sizeof(float));
  if (t % 32 < FX_BLOCKS * SPREAD && m < MINE) send(t % 32 / SPREAD, &shared[0][first + m * WARPS], mine);
  receive();
#else
  if (t % 32 < MINE) shared[row_of_block][first + m * WARPS] = mine;
  __syncthreads();
#endif
  if constexpr (PARTIALS <= FX_DIRECT) {
    float all[PARTIALS];
#pragma unroll
    for (int p = 0; p < PARTIALS; ++p) all[p] = shared[row_of_block][p];
    return tree<PARTIALS>(all);
  } else {  // 32 warps that each add 32 values would be 31 additions for every thread
    constexpr int WIDTH = PARTIALS <= 16 ? 16 : 32;
    mine = t % WIDTH < PARTIALS ? shared[row_of_block][t % WIDTH] : 0.0f;
#pragma unroll
    for (int distance = 1; distance < WIDTH; distance *= 2)
      mine = mine + __shfl_xor_sync(0xffffffffu, mine, distance);
    return mine;
  }
}

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
          if (active && i < FX_HIDDEN) w[c][m] = load<WIDE, false>(row.weight, i);
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
            if (active && i < FX_HIDDEN) held[c][m] = load<WIDE, FX_STREAM>(row.sum, i);
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
        x[c][m] = load<WIDE, FX_STREAM>(row.x, i);
        if constexpr (S::has_residual) residual[c][m] = load<WIDE, FX_STREAM>(row.residual, i);
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
          if (sums) store<WIDE, FX_STREAM>(row.sum, i, held[c][m]);
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
