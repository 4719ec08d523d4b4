// The product of int8 weights and activations rounded to int8. Owns rounding, blocking, threads and ragged edges; its
// micro-kernels see whole tiles and whole rounds only.
//
// A row of x becomes integers q in -127 to 127 with a scale and a zero point of its own: x = (q - zero point) * scale,
// with scale = (max(0, largest) - min(0, smallest)) / 254, so that 0 is exact. Products and sums are exact integers,
// whatever the instruction set, and then y = activation(sum * scale of x * scale of the row + bias) in fp32.
// A row of x that holds Inf or NaN has scale NaN, so that all of its y is NaN.
#pragma once

#include <cstdint>

#include "common/call.hpp"
#include "common/isa.hpp"
#include "common/processor.hpp"
#include "int8/layout.hpp"

namespace sparsecomp::int8 {

constexpr int kMostTiles = 2;
constexpr int kMostColumns = 8;
// Rows of rounded activations have so many columns or a multiple.
constexpr int kPanelUnit = 64;
constexpr float kLevels = 254;
constexpr int kLargest = 127;

// One row of x, rounded; its integers lie elsewhere.
struct RoundedRow {
  float scale;
  int32_t zero_point;  // of integers as the panel stores them
};

// One micro-kernel call: T tiles of rows by NB batch columns over `rounds` rounds.
struct MicroArgs {
  const uint8_t* values;    // block of the first tile and round
  const uint8_t* metadata;  // likewise
  int64_t value_stride;     // bytes from a tile to the next
  int64_t metadata_stride;
  int64_t rounds;
  const int32_t* row_sums;  // of the first row; those of T tiles follow
  bool narrow;              // all pairs are, see layout.hpp
  const uint8_t* x;         // [NB][ldx], rounded, signed or with 128 added as the kernel set says
  int64_t ldx;
  const RoundedRow* rows;  // [NB]
  bool stream;             // these weights are used for the first time: prefetch them, and the first of the next call's
  const uint8_t* next_values;
  const uint8_t* next_metadata;
  int32_t* partial;  // integer sums [NB][T * 16] of earlier rounds and for later ones, where there are any
  bool add;          // there are earlier rounds
  bool done;         // there are no later ones, and what follows is written
  // Where y is nothing but sum, scales and bias in fp32: y of the first row and column, ldy elements apart, with the
  // scales and the bias of the first row, or nullptr for ones and zeros. Else `y` is nullptr and `sums` gets
  // [NB][T * 16], each times the scale of its row of x.
  float* y;
  int64_t ldy;
  const float* scales;
  const float* bias;
  float* sums;
};

using Micro = void (*)(const MicroArgs&);

// The micro-kernels of one geometry, of every number of columns; those of two tiles may be nullptr.
struct MicroSet {
  bool signed_x;  // integers as they are, else with 128 added
  int copies;     // of the 16 integers of each step, side by side: one, or as many as a register holds
  Micro micro[kMostTiles + 1][kMostColumns + 1];
};

struct Kernels {
  const MicroSet* (*select)(const Geometry& g, int64_t batch);
  // Smallest and largest of the numbers and 0; false if one of them is Inf or NaN.
  bool (*range)(const float* x, int64_t count, float* smallest, float* largest);
  // The integer nearest to x * inverse, ties to even, plus the zero point, from -127 to 127, as the set wants it.
  // Writes whole blocks of kPanelUnit columns, those past `count` of any content.
  void (*round)(const float* x, int64_t count, float inverse, int zero_point, const MicroSet& set, uint8_t* to);
  double (*operations)(double seconds);  // measured, of independent multiply-adds of bytes on this thread, 2 for each
};

#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx2Vnni, kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon, kNeonDotprod;
#endif

// How numbers of that range are rounded, for integers that are stored as they are.
RoundedRow rounding_of(bool finite, float smallest, float largest);
// What a scale is divided by; 0 for NaN.
float inverse_of(const RoundedRow& row);

// SPARSECOMP_OK or SPARSECOMP_NO_MEMORY.
int linear(const Isa& isa, const Kernels& kernels, const Geometry& g, const LinearCall& call,
           const Processor& processor);

}  // namespace sparsecomp::int8
