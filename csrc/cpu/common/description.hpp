// Which descriptions of N:M weights there can be, whatever their layout.
#pragma once

#include <cstdint>

#include "sparsecomp.h"

namespace sparsecomp {

// Fewer (tile, step) blocks, of sides below kMostSide, keep every byte count below 2^63.
constexpr int64_t kMostSide = int64_t{1} << 31, kMostBlocks = int64_t{1} << 50;

static inline bool known_nm(const sparsecomp_nm& weight) {
  const bool group = weight.m == 2 || weight.m == 4 || weight.m == 8 || weight.m == 16;
  const bool sizes = weight.out_features >= 0 && weight.in_features >= 0 && weight.out_features < kMostSide &&
                     weight.in_features < kMostSide;
  return group && sizes && weight.n >= 1 && weight.n <= weight.m && weight.mask_rows >= 1;
}

}  // namespace sparsecomp
