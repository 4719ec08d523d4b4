// The blocked product y = epilogue(x W^T), and the interface of the micro-kernels it drives.
// Owns blocking, threads, conversion of x and ragged edges, so that micro-kernels see whole tiles and whole steps only.
#pragma once

#include <cstdint>

#include "layout.hpp"
#include "processor.hpp"

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

constexpr int kMostTiles = 4;
constexpr int kMostColumns = 8;
constexpr int kMostSpan = 2;

// One micro-kernel call: T tiles of rows by NB batch columns over `steps` column steps.
struct MicroArgs {
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
  // Where these are the last columns, and y is nothing but sum and bias in KernelSet::y_dtype: y of the first row and
  // column, ldy elements apart, to be written in place of `sums`, and the bias of the first row. Else nullptr.
  void* y;
  int64_t ldy;
  const void* bias;  // or nullptr
  bool stream;       // these weights are used for the first time: prefetch them, and the first of the next call's
  const uint8_t* next_values;
  const uint8_t* next_metadata;
};

using Micro = void (*)(const MicroArgs&);

// The micro-kernels of one geometry; micro[T][NB] may be nullptr, but micro[1][1] exists.
struct KernelSet {
  int x_dtype;  // SPARSECOMP_F32 or SPARSECOMP_BF16: what x must be converted to
  int span;     // the most steps of x that its kernels read at once: rows are readable up to a multiple of these
  Micro micro[kMostTiles + 1][kMostColumns + 1];
  int column_tiles;  // tiles of a call for a batch of one column: more are more streams of memory
  int y_dtype;       // what the kernels can write themselves, see MicroArgs::y; -1: nothing
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

struct PanelSet;

// One instruction set.
struct Isa {
  const char* name;
  const KernelSet* (*select)(const Geometry& g, const Processor&);
  const PanelSet* (*select_panels)(const Geometry& g, const Processor&);  // nullptr: none for the geometry
  void (*widen)(const void* from, int dtype, float* to, int64_t count);
  void (*finish)(const FinishArgs& args);
  double (*flops)(int dtype, double seconds);            // measured, of independent multiply-adds on this thread
  uint64_t (*read)(const uint8_t* from, int64_t bytes);  // reads as fast as this thread can
};

// SPARSECOMP_OK or SPARSECOMP_NO_MEMORY.
int blocked_linear(const Isa& isa, const KernelSet& kernels, const Geometry& g, const LinearCall& call,
                   const Processor& processor);

}  // namespace sparsecomp
