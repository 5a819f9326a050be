// exp and the sums over a row. Comes after cpu_words.h.
//
// The same plain operations for every element, in the vector part of a loop and behind it, on every
// machine (no fused multiply-adds): the bits of exp(x) do not depend on where x sits.
#pragma once

static inline f64 double_of(u64 bits) {
  f64 v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

static inline u64 bits_of(f64 v) {
  u64 bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// 2^n in two factors, so that a subnormal result is rounded once.
static inline float scaled(float v, i32 n) {
  const i32 half = n >> 1;
  return v * float_of((u32)(half + 127) << 23) * float_of((u32)(n - half + 127) << 23);
}
static inline f64 scaled(f64 v, fx_i64 n) {
  const fx_i64 half = n >> 1;
  return v * double_of((u64)(half + 1023) << 52) * double_of((u64)(n - half + 1023) << 52);
}

// x = n ln2 + r with |r| <= ln2 / 2: exp(x) = 2^n exp(r). ln2 is split so that n times its first
// part is exact; adding 1.5 * 2^23 (2^52) rounds to an integer. Comparisons let a NaN through.
static inline float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;  // 0
  x = x > 89.0f ? 89.0f : x;      // infinity
  const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;
  const float n = shifted - 0x1.8p+23f;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.a01a02p-13f;  // 1/7!
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  return scaled(1.0f + (r + r * r * p), (i32)(bits_of(shifted) - 0x4b400000u));
}

static inline f64 exponential(f64 x) {
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const f64 shifted = x * 0x1.71547652b82fep+0 + 0x1.8p+52;
  const f64 n = shifted - 0x1.8p+52;
  const f64 r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  f64 p = 1.0 / 6227020800.0;  // 1/13!
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return scaled(1.0 + (r + r * r * p), (fx_i64)(bits_of(shifted) - 0x4338000000000000ull));
}

// Once a row. By way of double, so that it is the same with every C library.
static inline float logarithm(float x) { return (float)__builtin_log((double)x); }
static inline f64 logarithm(f64 x) { return __builtin_log(x); }
static inline float root(float x) { return __builtin_sqrtf(x); }
static inline f64 root(f64 x) { return __builtin_sqrt(x); }

// ---- Over a row: lanes as in cpu_row.h, for float and double ---------------------------------

// The tree of sum_of_squares in cpu_row.h. Zeros behind a row change nothing.
template <class Term>
static inline C sum_over(fx_i64 count, Term term) {
  C total[LANES] = {};
  for (fx_i64 start = 0; start < count; start += BLOCK) {
    const fx_i64 end = start + BLOCK < count ? start + BLOCK : count;
    C lane[LANES] = {};
    fx_i64 i = start;
    for (; i + LANES <= end; i += LANES)
      for (int j = 0; j < LANES; ++j) lane[j] += term(i + j);
    for (int j = 0; j < (int)(end - i); ++j) lane[j] += term(i + j);
    for (int j = 0; j < LANES; ++j) total[j] += lane[j];
  }
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  return total[0];
}

// The largest term; NaNs are passed over. Exact, so its order is free.
template <class Term>
static inline C largest_over(fx_i64 count, Term term) {
  C lane[LANES];
  for (int j = 0; j < LANES; ++j) lane[j] = -__builtin_inff();
  fx_i64 i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; ++j) {
      const C value = term(i + j);
      lane[j] = value > lane[j] ? value : lane[j];
    }
  for (int j = 0; j < (int)(count - i); ++j) {
    const C value = term(i + j);
    lane[j] = value > lane[j] ? value : lane[j];
  }
  C most = lane[0];
  for (int j = 1; j < LANES; ++j) most = lane[j] > most ? lane[j] : most;
  return most;
}
