// The product by permutes, for any batch: lanes are rows of the weight, and the positions of a slot permute the
// activations of a step into them. panel.hpp is for large batches.
// Owns blocking, threads, conversion of x and ragged edges; its micro-kernels see whole tiles and whole steps only.
#pragma once

#include <cstdint>

#include "common/call.hpp"
#include "common/isa.hpp"
#include "common/processor.hpp"
#include "nm/layout.hpp"

namespace sparsecomp {

constexpr int kMostTiles = 4;
constexpr int kMostColumns = 8;
constexpr int kMostSpan = 2;

// One micro-kernel call: T tiles of rows by NB batch columns over `steps` column steps.
struct PermuteArgs {
  const Geometry* geometry;
  const uint8_t* values;    // block of the first tile and step
  const uint8_t* metadata;  // likewise
  int64_t value_stride;     // bytes from a tile to the next
  int64_t metadata_stride;
  const void* x;  // [NB][ldx], 16 * steps columns readable, float or bf16 as the kernel set says
  int64_t ldx;    // elements
  int64_t steps;
  float* sums;  // [NB][T * 16], contiguous
  bool add;     // `sums` holds the sums of earlier columns, to be added to
  // Where these are the last columns, and y is nothing but sum and bias in PermuteSet::y_dtype: y of the first row and
  // column, ldy elements apart, to be written in place of `sums`, and the bias of the first row. Else nullptr.
  void* y;
  int64_t ldy;
  const void* bias;  // or nullptr
  bool stream;       // these weights are used for the first time: prefetch them, and the first of the next call's
  const uint8_t* next_values;
  const uint8_t* next_metadata;
};

using PermuteMicro = void (*)(const PermuteArgs&);

// The micro-kernels of one geometry; micro[T][NB] may be nullptr, but micro[1][1] exists.
struct PermuteSet {
  int x_dtype;  // SPARSECOMP_F32 or SPARSECOMP_BF16: what x must be converted to
  int span;     // the most steps of x that its kernels read at once: rows are readable up to a multiple of these
  PermuteMicro micro[kMostTiles + 1][kMostColumns + 1];
  int column_tiles;  // tiles of a call for a batch of one column: more are more streams of memory
  int y_dtype;       // what the kernels can write themselves, see PermuteArgs::y; -1: nothing
  // Where the columns of a task take several micro-kernel calls, narrow values are widened once for all of them, a
  // slice of a tile at a time: by `widen`, a step to float [slots][16], for these kernels of fp32 values. Or nullptr.
  const PermuteSet* of_floats = nullptr;
  void (*widen)(const uint8_t* values, int dtype, int slots, float* to) = nullptr;
};

// SPARSECOMP_OK or SPARSECOMP_NO_MEMORY.
int permute_linear(const Isa& isa, const PermuteSet& kernels, const Geometry& g, const LinearCall& call,
                   const Processor& processor);

}  // namespace sparsecomp
