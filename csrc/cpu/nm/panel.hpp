// The product over transposed panels of x, for batches that fill registers: lanes are batch columns, a kept weight is
// broadcast, and its position says which row of the panel the multiply-add reads. No permutes, so the limit is loads.
// A set may leave the last columns of a panel as they are in x, for its micro-kernels to permute meanwhile; Intel's do
// not. Owns packing of x, blocking, threads and ragged edges; its micro-kernels see whole tiles and whole vectors only.
#pragma once

#include <cstdint>

#include "common/call.hpp"
#include "common/isa.hpp"
#include "common/processor.hpp"
#include "nm/layout.hpp"

namespace sparsecomp {

constexpr int kMostUnits = 16;

// One tile by one panel over `steps` column steps.
struct PanelArgs {
  const Geometry* geometry;
  const uint8_t* values;    // block of the first step; as laid out, or widened to float [slots][16] if the set says so
  const uint8_t* metadata;  // block of the first step
  const void* panel;        // elements of 4 bytes, for each step [16][transposed columns] and [permuted columns][16]
  int64_t steps;
  const int64_t* groups;       // elements from a step of the panel to a slot's group, for kernels that do not know N
  float* sums;                 // [16][transposed columns] and [permuted columns][16]
  int rows;                    // whose sums must be made
  bool add;                    // `sums` holds the sums of earlier columns, to be added to
  const uint8_t* next_values;  // of the next call, to be prefetched
  const char* output;          // where these sums will go: lines to be prefetched
  int64_t output_stride;       // bytes from one to the next
  int64_t output_rows;         // how many, or 0
};

using PanelMicro = void (*)(const PanelArgs&);
using Widen = decltype(Isa::widen);

struct PanelSet {
  int lanes;                         // floats in a register
  int unit;                          // columns that the width of a panel is a multiple of
  int x_dtype;                       // that pack() takes: SPARSECOMP_F32 or SPARSECOMP_BF16
  int most_units;                    // of a panel's width
  int64_t least_batch;               // narrower panels have no kernel, or are slower than the kernels of PermuteSet
  int64_t least_rows;                // of the weight, or packing takes what the kernels save
  int64_t least_outputs;             // for each thread, likewise
  double speedup;                    // over those, as measured, where no columns are wasted
  PanelMicro micro[kMostUnits + 1];  // by the panel's width in units
  int permuted[kMostUnits + 1];      // its last columns, left as in x (floats): all but a multiple of `lanes`
  // One step of `lanes` rows of x, ld_from elements apart, to `lanes` columns of the panel, `width` wide.
  void (*pack)(const void* from, int64_t ld_from, float* to, int64_t width);
  // to[j][i] = from[i][j] for `lanes` by `lanes` elements of 4 bytes
  void (*transpose)(const float* from, int64_t ld_from, float* to, int64_t ld_to);
  // A step of values of `dtype`, as laid out, to float [slots][16], for sets that take x in fp32; up to 16 floats more
  // are overwritten. `widen` is Isa::widen.
  void (*widen)(Widen widen, const uint8_t* values, int dtype, int slots, float* to);
  // By the panel's width in units: what a kept weight of one row costs, in multiply-adds with a memory operand. Such
  // sets are chosen by measured rates, not by the numbers above.
  double cost[kMostUnits + 1] = {};
};

// SPARSECOMP_OK or SPARSECOMP_NO_MEMORY.
int panel_linear(const Isa& isa, const PanelSet& kernels, const Geometry& g, const LinearCall& call,
                 const Processor& processor);

}  // namespace sparsecomp
