// Reductions over the rows of a matrix of one element type. Comes after cpu_exp.h.
#pragma once

struct FxRows {
  const void* x;       // rows of `size` contiguous elements, `stride` apart
  void* out;           // rows x size, contiguous, or null
  void* first;         // one per row, or null
  void* second;
  const void* weight;  // `size` of type C, or null
  const void* bias;
  fx_i64 rows, size, stride, what;
  fx_i64 wide;         // outputs are of type C, not of the element type; a layer norm's rows always
  fx_i64 threads;
  double p, eps;
};
// What to do, as in reduce_cpu.py.
enum { SUM, MEAN, COUNT, ABSOLUTE, SQUARE, POWER, MOST, LEAST };
enum { LOGSUMEXP = 8, SOFTMAX, LOG_SOFTMAX, VAR_MEAN, LAYER_NORM, CUMSUM };

static inline C magnitude(C v) { return v < 0 ? -v : v; }

static inline C mean_of(const FxRows& a, const Element* x) {
  return sum_over(a.size, [=](fx_i64 i) { return widen(x[i]); }) / (C)a.size;
}

// The p-th root of the sum of p-th powers. pow is called for each element, so it has one rounding.
static C power_norm(const FxRows& a, const Element* x) {
  const double p = a.p;
  const C sum = sum_over(
      a.size, [=](fx_i64 i) { return (C)__builtin_pow((double)magnitude(widen(x[i])), p); });
  return (C)__builtin_pow((double)sum, 1.0 / p);
}

// A NaN anywhere makes the result NaN.
template <class Key>
static inline C extreme(const FxRows& a, const Element* x, Key key) {
  const C most = largest_over(a.size, [=](fx_i64 i) { return key(widen(x[i])); });
  const C nans = sum_over(a.size, [=](fx_i64 i) {
    const C v = widen(x[i]);
    return v == v ? (C)0 : (C)1;
  });
  return nans > 0 ? (C)__builtin_nanf("") : magnitude(most);
}

static inline C reduced(const FxRows& a, const Element* x) {
  switch (a.what) {
    case SUM: return sum_over(a.size, [=](fx_i64 i) { return widen(x[i]); });
    case MEAN: return mean_of(a, x);
    case COUNT: return sum_over(a.size, [=](fx_i64 i) { return widen(x[i]) != 0 ? (C)1 : (C)0; });
    case ABSOLUTE: return sum_over(a.size, [=](fx_i64 i) { return magnitude(widen(x[i])); });
    case SQUARE: return root(sum_over(a.size, [=](fx_i64 i) { return widen(x[i]) * widen(x[i]); }));
    case MOST: return extreme(a, x, [](C v) { return magnitude(v); });
    case LEAST: return extreme(a, x, [](C v) { return -magnitude(v); });
    default: return power_norm(a, x);
  }
}

// ---- Exponentials ---------------------------------------------------------------------------

static inline C largest(const FxRows& a, const Element* x) {
  return largest_over(a.size, [=](fx_i64 i) { return widen(x[i]); });
}

static inline C exponentials(const FxRows& a, const Element* x, C shift) {
  return sum_over(a.size, [=](fx_i64 i) { return exponential(widen(x[i]) - shift); });
}

static inline C logsumexp(const FxRows& a, const Element* x) {
  const C most = largest(a, x);
  const C shift = magnitude(most) == __builtin_inff() ? (C)0 : most;  // inf - inf would be NaN
  return logarithm(exponentials(a, x, shift)) + shift;
}

template <class O>
static inline void softmax(const FxRows& a, const Element* x, O* __restrict out) {
  const C most = largest(a, x);
  if (a.what == LOG_SOFTMAX) {
    const C log_sum = logarithm(exponentials(a, x, most));
    for (fx_i64 i = 0; i < a.size; ++i) out[i] = stored<O>((widen(x[i]) - most) - log_sum);
  } else if constexpr (sizeof(O) == sizeof(C)) {  // the exponentials wait where the result goes
    const C sum = sum_over(
        a.size, [=](fx_i64 i) { return out[i] = exponential(widen(x[i]) - most); });
    for (fx_i64 i = 0; i < a.size; ++i) out[i] = out[i] / sum;
  } else {
    const C sum = exponentials(a, x, most);
    for (fx_i64 i = 0; i < a.size; ++i) out[i] = stored<O>(exponential(widen(x[i]) - most) / sum);
  }
}

// ---- Moments --------------------------------------------------------------------------------

static inline C squared_deviations(const FxRows& a, const Element* x, C mean) {
  return sum_over(a.size, [=](fx_i64 i) {
    const C d = widen(x[i]) - mean;
    return d * d;
  });
}

template <class O>
static inline void layer_norm(const FxRows& a, const Element* x, fx_i64 r) {
  const C mean = mean_of(a, x), var = squared_deviations(a, x, mean) / (C)a.size;
  const C scale = (C)1 / root(var + (C)a.eps);
  ((C*)a.first)[r] = stored<C>(mean);
  ((C*)a.second)[r] = stored<C>(scale);
  O* __restrict out = (O*)a.out + r * a.size;
  const C *weight = (const C*)a.weight, *bias = (const C*)a.bias;
  auto write = [=](auto affine) {
    for (fx_i64 i = 0; i < a.size; ++i) out[i] = stored<O>(affine((widen(x[i]) - mean) * scale, i));
  };
  if (weight && bias) return write([=](C v, fx_i64 i) { return v * weight[i] + bias[i]; });
  if (weight) return write([=](C v, fx_i64 i) { return v * weight[i]; });
  if (bias) return write([=](C v, fx_i64 i) { return v + bias[i]; });
  write([](C v, fx_i64) { return v; });
}

// In double, as torch adds float32 here.
template <class O>
static inline void cumulate(const FxRows& a, const Element* x, O* __restrict out) {
  double sum = 0;
  for (fx_i64 i = 0; i < a.size; ++i) out[i] = stored<O>((C)(sum += (double)widen(x[i])));
}

// ---- Rows -----------------------------------------------------------------------------------

template <class O>
static inline void one_row(const FxRows& a, fx_i64 r) {
  const Element* x = (const Element*)a.x + r * a.stride;
  switch (a.what) {
    case LOGSUMEXP: ((O*)a.first)[r] = stored<O>(logsumexp(a, x)); break;
    case SOFTMAX:
    case LOG_SOFTMAX: softmax(a, x, (O*)a.out + r * a.size); break;
    case VAR_MEAN: {
      const C mean = mean_of(a, x);
      const double rest = (double)a.size - a.p;
      const C divisor = (C)(rest > 0 ? rest : 0);
      ((O*)a.first)[r] = stored<O>(squared_deviations(a, x, mean) / divisor);
      ((O*)a.second)[r] = stored<O>(mean);
      break;
    }
    case LAYER_NORM: layer_norm<O>(a, x, r); break;
    case CUMSUM: cumulate(a, x, (O*)a.out + r * a.size); break;
    default: ((O*)a.first)[r] = stored<O>(reduced(a, x));
  }
}

enum { GRAIN = 8192 };  // elements of a task

extern "C" __attribute__((visibility("default"))) void fxpass_rows(const FxRows* a) {
  const fx_i64 rows = a->size < GRAIN ? GRAIN / (a->size + 1) + 1 : 1;
  each((a->rows + rows - 1) / rows, a->threads, [=](fx_i64 task) {
    const fx_i64 end = (task + 1) * rows < a->rows ? (task + 1) * rows : a->rows;
    for (fx_i64 r = task * rows; r < end; ++r)
      a->wide ? one_row<C>(*a, r) : one_row<Element>(*a, r);
  });
}
