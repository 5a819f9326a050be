// Which elements of a row a thread of `cuda.row` owns, and the sum over all threads. Compiled by
// NVRTC between cuda_pairs.h and cuda_units.h; cuda_row.h says what the macros are.
//
// A thread owns units of 8 consecutive elements: units t, t + FX_THREADS, ... of its block's segment
// of every chunk of FX_LANES elements, with one accumulator per unit. So any FX_THREADS and
// FX_BLOCKS give the same bits.

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

// A thread's first element of a row.
FX_INLINE int own_element(int t) { return (block_of_row() * SEGMENT + t) * 8; }

// From there on to one of its units.
FX_INLINE int place(int chunk, int mine) { return chunk * FX_LANES + mine * FX_THREADS * 8; }

// Whether there is such a unit: for most known while compiling.
FX_INLINE bool has_unit(int chunk, int mine, int t) {
  const int unit = block_of_row() * SEGMENT + mine * FX_THREADS + t;
  const bool in_chunk =
      FX_BLOCKS > 1 ? FX_BLOCKS * SEGMENT == UNITS : (mine + 1) * FX_THREADS <= UNITS;
  // Of all threads of all blocks.
  const int least = chunk * UNITS + mine * FX_THREADS;
  const int most = least + (FX_BLOCKS - 1) * SEGMENT + FX_THREADS - 1;
  const bool in_row = CHUNKS == 1 || most * 8 < FX_HIDDEN;
  if (CHUNKS > 1 && least * 8 >= FX_HIDDEN) return false;
  return (in_chunk || unit < UNITS) && (in_row || chunk * FX_LANES + unit * 8 < FX_HIDDEN);
}

// ---- The tree ----------------------------------------------------------------------------------

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
FX_INLINE float row_sum(const float* lane, u32 t, int row_of_block) {
  float mine = lane_sums<SPREAD>(lane, 1);
  if constexpr (PARTIALS == MINE) {
#pragma unroll
    for (int distance = 1; distance < SPREAD; distance *= 2)
      mine = mine + __shfl_xor_sync(0xffffffffu, mine, distance);
    return mine;
  }
  __shared__ alignas(16) float shared[FX_ROWS][32];
  const u32 m = t % SPREAD, first = block_of_row() * MINE * WARPS + t / 32;
#if FX_BLOCKS > 1
  until_all_set_up();
  if (t == 0) expect(PARTIALS * (int)sizeof(float));
  if (t % 32 < FX_BLOCKS * SPREAD && m < MINE)
    send(t % 32 / SPREAD, &shared[0][first + m * WARPS], mine);
  receive();
#else
  if (t % 32 < MINE) shared[row_of_block][first + m * WARPS] = mine;
  __syncthreads();
#endif
  // Every thread adds all of them, if that takes less than 5 shuffles of every warp together. From
  // 5 warps on it can cost registers, and with them a block of a multiprocessor.
  if constexpr (PARTIALS <= 8 || WARPS <= 4) {
    float all[PARTIALS];
#pragma unroll
    for (int p = 0; p < PARTIALS; ++p) all[p] = shared[row_of_block][p];
    return tree<PARTIALS>(all);
  } else {
    constexpr int WIDTH = PARTIALS <= 16 ? 16 : 32;
    mine = t % WIDTH < PARTIALS ? shared[row_of_block][t % WIDTH] : 0.0f;
#pragma unroll
    for (int distance = 1; distance < WIDTH; distance *= 2)
      mine = mine + __shfl_xor_sync(0xffffffffu, mine, distance);
    return mine;
  }
}
