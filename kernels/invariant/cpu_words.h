// What the C++ products and reductions share. Comes after cpu_args.h, the first half of cpu_row.h
// (the element types, loads and stores) and a line such as `#define ELEMENT bf16`.
#pragma once

typedef __INT32_TYPE__ i32;
typedef __UINT64_TYPE__ u64;
typedef double f64;
typedef ELEMENT Element;

static inline f64 widen(f64 v) { return v; }

// The type in which elements are multiplied and added.
template <class T>
struct Wide {
  typedef float type;
};
template <>
struct Wide<f64> {
  typedef f64 type;
};
typedef typename Wide<Element>::type C;

// One rounding to O. A NaN has one bit pattern: which of two NaNs survives an operation, and how it
// is narrowed, differs between instructions.
template <class O>
static inline O stored(C v) {
  v = v == v ? v : (C)__builtin_nanf("");
  if constexpr (sizeof(C) == 8) {
    return v;
  } else {
    return narrow<O>(v);
  }
}

// Runs task(i) for i in [0, count); which thread runs a task changes no bit.
template <class Task>
static inline void each(fx_i64 count, fx_i64 threads, Task task) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {  // entering a parallel region costs 0.6 us even with one thread
    const int most = (int)(count < threads ? count : threads);
#pragma omp parallel for schedule(dynamic) num_threads(most)
    for (fx_i64 i = 0; i < count; ++i) task(i);
    return;
  }
#endif
  for (fx_i64 i = 0; i < count; ++i) task(i);
}
