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

// Spelt out, so that the compiler keeps their order: it put the weight's behind the row's sum. (The
// assembler may still move one, but none ahead of griddepcontrol.wait.)
//
// The unit at `from`, whose first element is the row's element i.
template <bool WIDE, class T>
FX_INLINE Unit<T> load(const T* from, int i) {
  Unit<T> unit;
  if constexpr (WIDE) {
    uint4* to = (uint4*)&unit;
#pragma unroll
    for (int k = 0; k < (int)sizeof(unit) / 16; ++k)
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[k].x), "=r"(to[k].y), "=r"(to[k].z), "=r"(to[k].w)
                   : "l"((const uint4*)from + k) : "memory");
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
