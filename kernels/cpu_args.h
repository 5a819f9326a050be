// What one launch of a row kernel reads and writes. Shared by the row kernels, which are compiled
// one per spec, and by the glue, which is compiled once. kernels/cpu_call.py mirrors this struct.
#pragma once

typedef __INT64_TYPE__ fx_i64;

enum { FX_DIMS = 8 };  // leading dims that are left after adjacent ones are merged

struct FxArgs {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* out;
  void* sum;
  void* row;
  fx_i64 rows;
  fx_i64 hidden;
  fx_i64 weight_rows;  // row r uses weight row r % weight_rows
  fx_i64 bias_rows;
  fx_i64 dims;
  fx_i64 size[FX_DIMS];
  fx_i64 x_stride[FX_DIMS];  // in elements
  fx_i64 residual_stride[FX_DIMS];
  double eps;
  fx_i64 threads;
};
