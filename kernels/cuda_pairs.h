// Numbers of the CUDA kernels: 16-bit types as bits, and arithmetic on pairs of float32. Every
// rounding is one instruction, spelt out. Compiled by NVRTC, first; needs no header.

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

// Constants of c_struct.py, which NVRTC lacks.
#define __builtin_inff() __int_as_float(0x7f800000)
#define __builtin_nanf(text) __int_as_float(0x7fffffff)

#define FX_INLINE_MEMBER __device__ __forceinline__
#define FX_INLINE static __device__ __forceinline__

// ---- Two elements at a time ---------------------------------------------------------------------

// Half the conversions and stores of single elements; at few rows, where one block runs alone on a
// multiprocessor, instructions are most of the time.
struct pair {
  float lo, hi;
};
FX_INLINE pair operator+(pair a, pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
FX_INLINE pair operator+(pair a, float b) { return {a.lo + b, a.hi + b}; }
FX_INLINE pair operator*(pair a, pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
FX_INLINE pair operator*(pair a, float b) { return {a.lo * b, a.hi * b}; }
FX_INLINE pair divide(pair a, float b) { return {__fdiv_rn(a.lo, b), __fdiv_rn(a.hi, b)}; }

template <class T>
struct Two;  // the bits of two values of T
template <>
struct Two<f32> {
  pair v;
  FX_INLINE_MEMBER pair widen() const { return v; }
  FX_INLINE Two narrow(pair p) { return {p}; }
};
template <>
struct Two<bf16> {
  u32 bits;
  FX_INLINE_MEMBER pair widen() const {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  FX_INLINE Two narrow(pair p) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(p.hi), "f"(p.lo));
    return {bits};
  }
  // A product of two bf16 is exact in float32: one rounding either way.
  FX_INLINE Two product(Two a, Two b) {
    u32 bits;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(a.bits), "r"(b.bits), "r"(0x80008000u));
    return {bits};
  }
};
template <>
struct Two<f16> {
  u32 bits;
  FX_INLINE_MEMBER pair widen() const {
    pair p;
    asm("{ .reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }"
        : "=f"(p.lo), "=f"(p.hi)
        : "r"(bits));
    return p;
  }
  FX_INLINE Two narrow(pair p) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(p.hi), "f"(p.lo));
    return {bits};
  }
  FX_INLINE Two product(Two a, Two b) {
    u32 bits;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(a.bits), "r"(b.bits));
    return {bits};
  }
};
template <>
struct Two<none> {
  FX_INLINE_MEMBER pair widen() const { return {0.0f, 0.0f}; }
};

template <class T>
FX_INLINE pair rounded(pair v) {
  return Two<T>::narrow(v).widen();
}
template <class T>
FX_INLINE float rounded(float v) {
  return Two<T>::narrow({v, 0.0f}).widen().lo;
}

template <class T>
FX_INLINE void store_one(T* to, float v) {
  const Two<T> two = Two<T>::narrow({v, 0.0f});
  *to = *(const T*)&two;
}
