// Units of eight elements in memory. Compiled by NVRTC between cuda_lanes.h and cuda_row.h, which
// says what the macros are.

template <class T>
struct alignas(16) Unit {
  Two<T> v[4];
};
template <>
struct Unit<none> {
  Two<none> v[4];
};

// How the L2 is to treat what is loaded: like anything else, or evict everything else first. Made
// once: inside a condition it parts that load from the others.
struct Policy {
  u64 bits;
};
FX_INLINE Policy evict_last() {
  Policy policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

// Spelt out, so that the compiler keeps their order: it put the weight's behind the row's sum. (The
// assembler may still move one, but none ahead of griddepcontrol.wait.)
FX_INLINE void load_16(uint4& to, const uint4* from, none) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from) : "memory");
}
FX_INLINE void load_16(uint4& to, const uint4* from, Policy policy) {
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from), "l"(policy.bits) : "memory");
}

// The unit at `from`, whose first element is the row's element i.
template <bool WIDE, class T, class P = none>
FX_INLINE Unit<T> load(const T* from, int i, P policy = {}) {
  Unit<T> unit;
  if constexpr (WIDE) {
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k)
      load_16(((uint4*)&unit)[k], (const uint4*)from + k, policy);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      ((T*)&unit)[j] = FX_HIDDEN % 8 == 0 || i + j < FX_HIDDEN ? from[j] : T{};
  }
  return unit;
}

template <bool WIDE, class T>
FX_INLINE void store(T* to, int i, const Unit<T>& unit) {
  if constexpr (WIDE) {
    const uint4* from = (const uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"((uint4*)to + k),
                   "r"(from[k].x), "r"(from[k].y), "r"(from[k].z), "r"(from[k].w) : "memory");
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (FX_HIDDEN % 8 == 0 || i + j < FX_HIDDEN) to[j] = ((const T*)&unit)[j];
  }
}
