// The product of a block-sparse weight, and the interface of the micro-kernels it drives.
// Owns panels of x, threads and ragged edges, so that micro-kernels see whole vectors only.
#pragma once

#include <cstdint>

#include "block/layout.hpp"
#include "common/call.hpp"
#include "common/isa.hpp"

namespace sparsecomp {

// One micro-kernel call: a strip of a block row by a panel of batch columns.
struct BlockMicroArgs {
  const uint8_t* values;   // first vector of the strip
  const int32_t* columns;  // of its kept blocks
  int64_t blocks;          // how many
  int64_t groups;          // vectors per block
  const float* x;          // panel [column group][width][lane_cols]
  float* sums;             // [width][ld], lane_rows of each written
  int64_t ld;
};

using BlockMicro = void (*)(const BlockMicroArgs&);

constexpr int kMostWidths = 6;

// The micro-kernels of an instruction set, by element type, lane shape and panel width.
struct BlockKernels {
  int width_count;
  int widths[kMostWidths];  // ascending, from 1
  BlockMicro micro[3][kLaneShapes][kMostWidths];
};

#if defined(__x86_64__)
extern const BlockKernels kBlockAvx2, kBlockAvx512;
#elif defined(__aarch64__)
extern const BlockKernels kBlockNeon;
#endif

// SPARSECOMP_OK, SPARSECOMP_NO_MEMORY, or SPARSECOMP_INVALID for damaged metadata.
int block_linear(const Isa& isa, const BlockKernels& kernels, const BlockGeometry& g, const LinearCall& call);

}  // namespace sparsecomp
