// Sixteen elements at a time, for specs with f16 in them. g++ 12 has instructions for the f16
// conversions but does not vectorise them; in integer arithmetic they cost 3 times Inductor's
// kernel. The values, their order and their lanes are those of the plain loops: same bits.
#pragma once

#if defined(__F16C__) && defined(__GNUC__) && !defined(__clang__)
#define F16_WIDE 1

typedef u32 u32x16 __attribute__((vector_size(64)));
typedef u16 u16x16 __attribute__((vector_size(32)));
typedef short s16x16 __attribute__((vector_size(32)));
typedef short s16x8 __attribute__((vector_size(16)));

static inline v16 from_f16(u16x16 half) {
#ifdef __AVX512F__
  return (v16)__builtin_ia32_vcvtph2ps512_mask((s16x16)half, v16{}, -1, 4);
#else
  s16x8 part[2];
  __builtin_memcpy(part, &half, sizeof(half));
  v8 wide[2] = {__builtin_ia32_vcvtph2ps256(part[0]), __builtin_ia32_vcvtph2ps256(part[1])};
  v16 all;
  __builtin_memcpy(&all, wide, sizeof(all));
  return all;
#endif
}

static inline u16x16 to_f16(v16 v) {
#ifdef __AVX512F__
  return (u16x16)__builtin_ia32_vcvtps2ph512_mask(v, 0, s16x16{}, -1);
#else
  v8 wide[2];
  __builtin_memcpy(wide, &v, sizeof(v));
  s16x8 part[2] = {__builtin_ia32_vcvtps2ph256(wide[0], 0), __builtin_ia32_vcvtps2ph256(wide[1], 0)};
  u16x16 half;
  __builtin_memcpy(&half, part, sizeof(half));
  return half;
#endif
}

static inline u32x16 bf16_rounded(v16 v) {
  u32x16 bits = (u32x16)v;
  u32x16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? u32x16{} + 0x7fc00000u : rounded;
}

template <class T>
static inline v16 rounded(v16 v) {
  if constexpr (T::mantissa == 8) return (v16)(bf16_rounded(v) & 0xffff0000u);
  return from_f16(to_f16(v));
}

static inline v16 get16(const float* p) {
  v16 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
static inline v16 get16(const T* p) {
  u16x16 half;
  __builtin_memcpy(&half, p, sizeof(half));
  if constexpr (T::mantissa == 8) return (v16)(__builtin_convertvector(half, u32x16) << 16);
  return from_f16(half);
}

static inline void put16(float* p, v16 v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <class T>
static inline void put16(T* p, v16 v) {
  u16x16 half;
  if constexpr (T::mantissa == 8) {
    half = __builtin_convertvector(bf16_rounded(v) >> 16, u16x16);
  } else {
    half = to_f16(v);
  }
  __builtin_memcpy(p, &half, sizeof(half));
}

// The sixteen values at i that are normalised; the sum is rounded by its way through memory.
template <class S>
static inline v16 normed16(const typename S::X* x, const typename S::Residual* residual,
                           typename S::Sum* sum, fx_i64 i) {
  if constexpr (!S::has_residual) {
    return get16(x + i);
  } else {
    typename S::Sum total[16];
    put16(total, get16(x + i) + get16(residual + i));
    if constexpr (S::writes_sum) __builtin_memcpy(sum + i, total, sizeof(total));
    return get16(total);
  }
}

// Adds the squares of whole groups of 64 to their lanes; returns where the groups end.
template <class S>
static inline fx_i64 add_squares16(const typename S::X* x, const typename S::Residual* residual,
                                   typename S::Sum* sum, fx_i64 i, fx_i64 end, float* lane) {
  v16 a = get16(lane), b = get16(lane + 16), c = get16(lane + 32), d = get16(lane + 48);
  for (; i + LANES <= end; i += LANES) {
    a += S::square(normed16<S>(x, residual, sum, i));
    b += S::square(normed16<S>(x, residual, sum, i + 16));
    c += S::square(normed16<S>(x, residual, sum, i + 32));
    d += S::square(normed16<S>(x, residual, sum, i + 48));
  }
  put16(lane, a), put16(lane + 16, b), put16(lane + 32, c), put16(lane + 48, d);
  return i;
}

template <class S>
static inline fx_i64 write16(const typename S::X* x, const typename S::Residual* residual,
                             typename S::Sum* sum, const typename S::Weight* weight,
                             const typename S::Bias* bias, typename S::Out* out, fx_i64 hidden,
                             float scale) {
  fx_i64 i = 0;
  for (; i + 16 <= hidden; i += 16) {
    v16 value, factor = {}, shift = {};
    if constexpr (S::writes_sum) {
      value = get16(sum + i);
    } else {
      value = normed16<S>(x, residual, sum, i);
    }
    if constexpr (S::has_weight) factor = S::factor(get16(weight + i));
    if constexpr (S::has_bias) shift = get16(bias + i);
    put16(out + i, S::element(value, scale, factor, shift));
  }
  return i;
}
#endif
