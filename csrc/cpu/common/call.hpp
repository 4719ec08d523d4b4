// What every product is asked for, whatever its weight: x, y, the epilogue, threads; and how sums become y.
#pragma once

#include <cstdint>

#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp {

struct LinearCall {
  const uint8_t* values;
  const uint8_t* metadata;
  int dtype;  // of x, y and the bias
  const void* x;
  int64_t ldx;
  int64_t batch;
  sparsecomp_epilogue epilogue;
  void* y;
  int64_t ldy;
  int threads;
};

// y[column][0..rows) = epilogue(sums[column][0..rows)), in `dtype`; rows of `sums` are `ld` apart, and whole tiles of
// them can be read.
struct FinishArgs {
  const float* sums;
  int64_t ld;
  int rows;
  int columns;
  sparsecomp_epilogue epilogue;  // its pointers are to the first row
  void* y;                       // element of the first row and column
  int64_t ldy;
  int dtype;
};

static inline bool known_activation(int activation) {
  return activation >= SPARSECOMP_NO_ACTIVATION && activation <= SPARSECOMP_SILU;
}

// The epilogue of the rows from `row` on; they are elements of `dtype`.
static inline sparsecomp_epilogue epilogue_at(const sparsecomp_epilogue& all, int64_t row, int dtype) {
  sparsecomp_epilogue part = all;
  if (all.row_scales) part.row_scales = all.row_scales + row;
  if (all.bias) part.bias = static_cast<const uint8_t*>(all.bias) + row * element_bytes(dtype);
  return part;
}

}  // namespace sparsecomp
