// The micro-kernels of the product over panels, for any vector type.
// Included by files that are compiled for one instruction set; everything here is local to the file that includes it.
//
//   Vector::Register, Vector::kLanes, zero(), load(pointer), store(pointer, v), broadcast(float)
//   Vector::add_product(a, b, &sum)   sum += a * b, where b is a register or what to load it from
//   Vector::kOneRegister              whether the address of b is one register and a displacement: Intel's processors
//                                     take the instruction apart if it has two
#pragma once

#include <cstring>

#include "common/unroll.hpp"
#include "nm/panel.hpp"

namespace sparsecomp {
namespace {

template <class T>
SPARSECOMP_INLINE T load_as(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// The positions of one row in one step, in slot order, as one integer. Step: a StepGeometry.
template <class Step>
SPARSECOMP_INLINE uint64_t row_bits(const Geometry& g, const uint8_t* block, int row) {
  const int full_words = Step::kStatic ? Step::kFullWords : g.full_words;
  const int rest_bytes = Step::kStatic ? Step::kRestBytes : g.rest_bytes;
  const auto word = [&](int index) __attribute__((always_inline)) -> uint64_t {
    const uint8_t* plane = block + index * kTile * 4;
    if (index < full_words || rest_bytes == 4) return load_as<uint32_t>(plane + row * 4);
    if (rest_bytes == 1) return plane[row];
    const uint64_t low = load_as<uint16_t>(plane + row * 2);
    return rest_bytes == 2 ? low : low | uint64_t{plane[kTile * 2 + row]} << 16;
  };
  const int words = full_words + (rest_bytes != 0);
  return words == 1 ? word(0) : word(0) | word(1) << (Step::kWordSlots * Step::kBits);
}

// Bytes from a group of the panel to its row `(bits >> shift) & mask`. Opaque to the compiler, so that the vectors of
// the row are displacements: it would make each address on its own, and spill them.
template <int64_t kRowBytes>
SPARSECOMP_INLINE uint64_t row_offset(uint64_t bits, int shift, int mask) {
  uint64_t offset = ((bits >> shift) & static_cast<uint64_t>(mask)) * kRowBytes;
  __asm__("" : "+r"(offset));
  return offset;
}

template <class Vector>
SPARSECOMP_INLINE const float* vector_at(const float* group, int c, uint64_t offset) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(group + c * Vector::kLanes) + offset);
}

// One slot of R rows by C vectors; `bits` holds the positions of the rows, or of all of them if they share a mask: then
// a row of the panel is loaded once for all. `group`: elements from `panel` to the slot's group.
template <class Vector, int R, int C, bool kShared>
SPARSECOMP_INLINE void multiply_slot(const float* values, const float* panel, int64_t group, const uint64_t* bits,
                                     int shift, int mask, typename Vector::Register (&sums)[R][C]) {
  constexpr int64_t kRowBytes = int64_t{C} * Vector::kLanes * 4;
  if constexpr (kShared) {
    const uint64_t offset = row_offset<kRowBytes>(bits[0], shift, mask);
    typename Vector::Register weights[R];
    SPARSECOMP_UNROLL
    for (int r = 0; r < R; ++r) weights[r] = Vector::broadcast(values[r]);
    SPARSECOMP_UNROLL
    for (int c = 0; c < C; ++c) {
      const typename Vector::Register activations = Vector::load(vector_at<Vector>(panel + group, c, offset));
      SPARSECOMP_UNROLL
      for (int r = 0; r < R; ++r) Vector::add_product(weights[r], activations, &sums[r][c]);
    }
  } else {
    SPARSECOMP_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint64_t offset = row_offset<kRowBytes>(bits[r], shift, mask);
      const typename Vector::Register weight = Vector::broadcast(values[r]);
      const float* row = vector_at<Vector>(panel, 0, offset);
      if constexpr (Vector::kOneRegister) __asm__("" : "+r"(row));
      SPARSECOMP_UNROLL
      for (int c = 0; c < C; ++c) {
        const float* at =
            Vector::kOneRegister ? row + group + c * Vector::kLanes : vector_at<Vector>(panel + group, c, offset);
        Vector::add_product(weight, at, &sums[r][c]);
      }
    }
  }
}

// Here, too, the pointers are opaque, so that GCC takes displacements.
template <class Vector, int R, int C>
SPARSECOMP_INLINE void load_sums(const PanelArgs& args, int row, typename Vector::Register (&sums)[R][C]) {
  const float* from = args.sums + row * C * Vector::kLanes;
  __asm__("" : "+r"(from));
  const bool add = args.add;
  SPARSECOMP_UNROLL
  for (int r = 0; r < R; ++r) {
    SPARSECOMP_UNROLL
    for (int c = 0; c < C; ++c) sums[r][c] = add ? Vector::load(from + (r * C + c) * Vector::kLanes) : Vector::zero();
  }
}

template <class Vector, int R, int C>
SPARSECOMP_INLINE void store_sums(const PanelArgs& args, int row, const typename Vector::Register (&sums)[R][C]) {
  float* to = args.sums + row * C * Vector::kLanes;
  __asm__("" : "+r"(to));
  SPARSECOMP_UNROLL
  for (int r = 0; r < R; ++r) {
    SPARSECOMP_UNROLL
    for (int c = 0; c < C; ++c) Vector::store(to + (r * C + c) * Vector::kLanes, sums[r][c]);
  }
}

// Asks for the values of the tile that comes next, in their order, while the rows [row, row + R) of this one pass over
// their steps: at every step as many lines, or the end of the loop would be foreseen badly.
// Lines: of 64 bytes that the values of a step take at most, or 0 if that is not known.
template <int R, int Lines>
class NextValues {
 public:
  SPARSECOMP_INLINE NextValues(const PanelArgs& args, int row)
      : share_(args.geometry->value_bytes * R / kTile), at_(args.next_values + row / R * args.steps * share_) {
    if constexpr (Lines == 0) lines_ = (share_ + 63) / 64;
  }

  SPARSECOMP_INLINE void step() {
    if constexpr (Lines != 0) {
      SPARSECOMP_UNROLL
      for (int64_t i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * 64);
    } else {
      for (int64_t i = 0; i < lines_; ++i) __builtin_prefetch(at_ + i * 64);
    }
    at_ += share_;
  }

 private:
  static constexpr int64_t kLines = (Lines * R + kTile - 1) / kTile;
  int64_t lines_ = kLines;
  const int64_t share_;  // bytes for each step of R rows
  const uint8_t* at_;
};

// R rows by C vectors. N = 0: any N, read from the geometry; else the loop over the slots of a step is unrolled.
template <class Vector, int M, int N, int R, int C, bool kShared>
struct FloatRows {
  SPARSECOMP_INLINE static void run(const PanelArgs& args, int row) {
    constexpr int64_t kWidth = int64_t{C} * Vector::kLanes;
    constexpr int kMasks = kShared ? 1 : R;
    using Step = StepGeometry<M, N>;
    const Geometry& g = *args.geometry;
    const float* values = reinterpret_cast<const float*>(args.values) + row;
    const uint8_t* metadata = args.metadata;
    const float* panel = static_cast<const float*>(args.panel);
    typename Vector::Register sums[R][C];
    load_sums<Vector>(args, row, sums);
    NextValues<R, Step::kSlots> next(args, row);
    for (int64_t step = 0; step < args.steps; ++step) {
      next.step();
      uint64_t bits[kMasks];
      SPARSECOMP_UNROLL
      for (int r = 0; r < kMasks; ++r) bits[r] = row_bits<Step>(g, metadata, row + r);
      if constexpr (N != 0) {
        SPARSECOMP_UNROLL
        for (int slot = 0; slot < Step::kSlots; ++slot)
          multiply_slot<Vector, R, C, kShared>(values + slot * kTile, panel, slot / N * M * kWidth, bits,
                                               slot * Step::kBits, M - 1, sums);
      } else {
        for (int slot = 0; slot < g.slots; ++slot) {  // one loop: nested ones, over groups and slots, mispredict
          const float* group = panel + (M == 16 ? 0 : args.groups[slot]);
          multiply_slot<Vector, R, C, kShared>(values + slot * kTile, group, 0, bits, 0, M - 1, sums);
          SPARSECOMP_UNROLL
          for (int r = 0; r < kMasks; ++r) bits[r] >>= Step::kBits;
        }
      }
      values += (N != 0 ? Step::kSlots : g.slots) * kTile;
      metadata += g.metadata_bytes;
      panel += kStep * kWidth;
    }
    store_sums<Vector>(args, row, sums);
  }
};

// All rows of a tile, R at a time, by Rows::run(args, row).
template <class Rows, int R>
void panel_micro(const PanelArgs& args) {
  constexpr int kToL2 = 2;
  const int64_t share = (args.output_rows * R + kTile - 1) / kTile;
  const char* output = args.output;
  for (int row = 0; row < args.rows; row += R) {
    for (int64_t i = 0; i < share; ++i, output += args.output_stride) __builtin_prefetch(output, 0, kToL2);
    Rows::run(args, row);
  }
}

// A step of values of another type as float [slots][16]. Here, where vectors can do it. Values of 16 bits lie
// as pairs of slots.
inline void widen_values(Widen widen, const uint8_t* values, int dtype, int slots, float* to) {
  if (dtype == SPARSECOMP_I8) {
    for (int i = 0; i < slots * kTile; ++i) to[i] = static_cast<int8_t>(values[i]);
    return;
  }
  const int pairs = (slots + 1) / 2;
  if (dtype == SPARSECOMP_BF16) {
    for (int pair = 0; pair < pairs; ++pair) {
      uint32_t words[kTile], even[kTile], odd[kTile];
      std::memcpy(words, values + pair * sizeof(words), sizeof(words));
      for (int row = 0; row < kTile; ++row) {
        even[row] = words[row] << 16;
        odd[row] = words[row] & 0xffff0000u;
      }
      std::memcpy(to + pair * 2 * kTile, even, sizeof(even));
      std::memcpy(to + (pair * 2 + 1) * kTile, odd, sizeof(odd));
    }
    return;
  }
  alignas(64) float local[kStep * kTile];
  widen(values, dtype, local, pairs * 2 * kTile);
  for (int pair = 0; pair < pairs; ++pair) {
    const float* from = local + pair * 2 * kTile;
    float* even = to + pair * 2 * kTile;
    float* odd = even + kTile;
    for (int row = 0; row < kTile; ++row) {
      even[row] = from[2 * row];
      odd[row] = from[2 * row + 1];
    }
  }
}

template <class Vector, int M, int N, int R, int Least, int C, bool kShared>
constexpr void fill_widths(PanelMicro (&micro)[kMostUnits + 1]) {
  micro[C] = panel_micro<FloatRows<Vector, M, N, R, C, kShared>, R>;
  if constexpr (C > Least) fill_widths<Vector, M, N, R, Least, C - 1, kShared>(micro);
}

// A row of the panel for each column.
template <class Vector>
void pack_columns(const void* from, int64_t ld_from, float* to, int64_t width) {
  for (int64_t k = 0; k < kStep; k += Vector::kLanes)
    Vector::transpose(static_cast<const float*>(from) + k, ld_from, to + k * width, width);
}

// R rows by Least to Most vectors: a batch of at least `least_batch`, cut evenly, never makes narrower panels.
template <class Vector, int M, int N, int R, int Least, int Most, bool kShared>
constexpr PanelSet make_panel_set(int64_t least_batch, int64_t least_rows, double speedup) {
  PanelSet set{
      Vector::kLanes,       Vector::kLanes,    SPARSECOMP_F32, Most, least_batch, least_rows, 0, speedup, {}, {},
      pack_columns<Vector>, Vector::transpose, widen_values};
  fill_widths<Vector, M, N, R, Least, Most, kShared>(set.micro);
  return set;
}

}  // namespace
}  // namespace sparsecomp
