// Asking for the lines of y, and of sums, before their turn. Rows of y are far apart: without this every store waits
// for its line, which for sparse weights is a good part of the product.
#pragma once

#include <cstdint>

#include "common/unroll.hpp"

namespace sparsecomp {

// `rows` rows of `bytes` bytes, `stride` bytes apart. Always inlined: GCC takes a function that does nothing but
// prefetch for one without effect, and leaves out the calls.
static SPARSECOMP_INLINE void prefetch_rows(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
  const auto* at = static_cast<const uint8_t*>(first);
  for (int64_t row = 0; row < rows; ++row, at += stride)
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 1);
}

}  // namespace sparsecomp
