// The product over transposed panels of x, for batches that fill registers: lanes are batch columns, a kept weight is
// broadcast, and its position says which row of the panel the multiply-add reads. No permutes, so the limit is loads.
// Owns packing of x, blocking, threads and ragged edges; its micro-kernels see whole tiles and whole vectors only.
#pragma once

#include <cstdint>

#include "linear.hpp"

namespace sparsecomp {

constexpr int kMostVectors = 8;

// One tile by one panel over `steps` column steps.
struct PanelArgs {
  const Geometry* geometry;
  const uint8_t* values;    // block of the first step; as laid out, or widened to float [slots][16] if the set says so
  const uint8_t* metadata;  // block of the first step
  const void* panel;        // [16 * steps][width] elements of 4 bytes
  int64_t steps;
  const int64_t* groups;       // for each slot of a step: elements of the panel from the step to the slot's group
  float* sums;                 // [16][width]
  int rows;                    // that exist; the sums of others need not be made
  bool add;                    // `sums` holds the sums of earlier columns, to be added to
  const uint8_t* next_values;  // of the next call, to be prefetched
  const char* output;          // where these sums will go: lines to be prefetched
  int64_t output_stride;       // bytes from one to the next
  int64_t output_rows;         // how many, or 0
};

using PanelMicro = void (*)(const PanelArgs&);

struct PanelSet {
  int lanes;                           // floats in a register
  int x_dtype;                         // that pack() takes: SPARSECOMP_F32 or SPARSECOMP_BF16
  int most_vectors;                    // of a panel's width
  int64_t least_batch;                 // narrower panels have no kernel, or are slower than the kernels of KernelSet
  double speedup;                      // over those, as measured, where no lanes are wasted
  PanelMicro micro[kMostVectors + 1];  // by the panel's width in vectors
  // One step of `lanes` rows of x, ld_from elements apart, to `lanes` columns of the panel, `width` wide.
  void (*pack)(const void* from, int64_t ld_from, float* to, int64_t width);
  // to[j][i] = from[i][j] for `lanes` by `lanes` elements of 4 bytes
  void (*transpose)(const float* from, int64_t ld_from, float* to, int64_t ld_to);
};

// Whether panels are worth their packing, and the lanes that the batch leaves empty.
static inline bool panels_pay(const PanelSet& kernels, int64_t batch) {
  const int64_t padded = (batch + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  return batch >= kernels.least_batch && static_cast<double>(batch) * kernels.speedup >= static_cast<double>(padded);
}

// SPARSECOMP_OK or SPARSECOMP_NO_MEMORY.
int panel_linear(const Isa& isa, const PanelSet& kernels, const Geometry& g, const LinearCall& call);

}  // namespace sparsecomp
