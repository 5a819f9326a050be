// Scores of attention become probabilities, in place. Comes after cpu_exp.h.
#pragma once

struct FxScores {
  C* scores;         // (batch, heads, rows, keys), contiguous: q @ k, then exp(score - largest)
  C* sums;           // (batch, heads, rows), contiguous: of the exponentials; 1 where there are none
  C* logs;           // (batch, heads, length), contiguous: logsumexp; row 0 of `rows` is at `first`
  const void* mask;  // bytes or C, or null
  fx_i64 batch, heads, rows, keys, length, first;
  fx_i64 mask_stride[4];
  fx_i64 mask_is_bool, causal, threads;
  double scale;
};

// Scores of masked keys are replaced, whatever they are: padding may hold NaN.
static inline void apply_mask(const FxScores& a, C* __restrict score, fx_i64 keys, const void* mask) {
  const C scale = (C)a.scale, none = -__builtin_inff();
  const fx_i64 step = a.mask_stride[3];
  if (!mask) {
    for (fx_i64 j = 0; j < keys; ++j) score[j] = score[j] * scale;
  } else if (a.mask_is_bool) {
    const unsigned char* allowed = (const unsigned char*)mask;
    for (fx_i64 j = 0; j < keys; ++j) score[j] = allowed[j * step] ? score[j] * scale : none;
  } else {
    const C* added = (const C*)mask;
    for (fx_i64 j = 0; j < keys; ++j) {
      const C more = added[j * step];
      score[j] = more == none ? none : score[j] * scale + more;
    }
  }
}

static inline void row_of_scores(const FxScores& a, fx_i64 r) {
  const fx_i64 row = r % a.rows, head = r / a.rows % a.heads, batch = r / a.rows / a.heads;
  const fx_i64 query = a.first + row;
  const fx_i64 keys = a.causal && query + 1 < a.keys ? query + 1 : a.keys;
  C* __restrict score = a.scores + r * a.keys;
  const char* mask = (const char*)a.mask;
  if (mask) {
    const fx_i64 at =
        batch * a.mask_stride[0] + head * a.mask_stride[1] + query * a.mask_stride[2];
    mask += at * (a.mask_is_bool ? 1 : (fx_i64)sizeof(C));
  }
  apply_mask(a, score, keys, mask);
  const C most = largest_over(keys, [=](fx_i64 j) { return score[j]; });
  // With no key at all: exp(-inf - 0) is 0 everywhere. A NaN among the scores still gets through.
  const C shift = most == -__builtin_inff() ? (C)0 : most;
  const C sum = sum_over(keys, [=](fx_i64 j) { return score[j] = exponential(score[j] - shift); });
  for (fx_i64 j = keys; j < a.keys; ++j) score[j] = 0;
  a.sums[r] = sum == 0 ? (C)1 : sum;
  a.logs[(batch * a.heads + head) * a.length + query] =
      stored<C>(sum == 0 ? (C)0 : shift + logarithm(sum));
}

extern "C" __attribute__((visibility("default"))) void fxpass_scores(const FxScores* a) {
  each(a->batch * a->heads * a->rows, a->threads, [=](fx_i64 r) { row_of_scores(*a, r); });
}
