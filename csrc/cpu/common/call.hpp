// What every product is asked for: the tensors of its weight, x, y, the epilogue, threads; and how sums become y.
#pragma once

#include <cstdint>

#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp {

struct LinearCall {
  const uint8_t* values;
  const uint8_t* metadata;
  const float* scales;  // one for each row, or null for ones
  int dtype;            // of x, y and the bias
  const void* x;
  int64_t ldx;
  int64_t batch;
  sparsecomp_epilogue epilogue;
  void* y;
  int64_t ldy;
  int threads;
};

// y[column][0..rows) = epilogue(scales * sums[column][0..rows)), in `dtype`; rows of `sums` are `ld` apart, and whole
// tiles of them can be read.
struct FinishArgs {
  const float* sums;
  int64_t ld;
  int rows;
  int columns;
  const float* scales;           // of the rows, or null for ones
  sparsecomp_epilogue epilogue;  // its bias is that of the first row
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
  if (all.bias) part.bias = static_cast<const uint8_t*>(all.bias) + row * element_bytes(dtype);
  return part;
}

// The scales of the rows from `row` on.
static inline const float* scales_at(const LinearCall& call, int64_t row) {
  return call.scales ? call.scales + row : nullptr;
}

}  // namespace sparsecomp
