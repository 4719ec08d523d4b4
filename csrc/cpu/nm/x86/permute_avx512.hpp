// The frame that all AVX-512 micro-kernels share: walk over steps, index words and pairs of slots of a block.
// Included by files that are compiled for AVX-512 only; everything here is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "common/unroll.hpp"
#include "nm/kernel_list.hpp"
#include "nm/permute.hpp"
#include "nm/x86/prefetch.hpp"

namespace sparsecomp {
namespace {

// In-group positions of 16 rows: index word `word` of a metadata block.
inline __m512i load_index_word(const uint8_t* block, int word, int full_words, int rest_bytes) {
  const uint8_t* plane = block + word * kTile * 4;
  if (word < full_words || rest_bytes == 4) return _mm512_loadu_si512(plane);
  if (rest_bytes == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
  if (rest_bytes == 1) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
  const __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + kTile * 2)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Columns within a step of the slot in the lowest bits of index words. A group of 16 needs no base, and a permute reads
// the low four bits only.
template <int M>
inline __m512i slot_columns(__m512i word, int base) {
  if (M == 16) return word;
  // (word & mask) | base
  return _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(M - 1), _mm512_set1_epi32(base), 0xea);
}

// The shape of one step, known at compile time where N is (N = 0: any N, read from the geometry).
template <int M, int N, class Base>
struct StepShape : StepGeometry<M, N> {
  static_assert(StepShape::kSlots <= StepShape::kWordSlots,
                "kernels of their own read the positions of a step from one index word");

  Base bases[kMostSpan][kStep + 1];  // of the steps in a register of x: for each slot, the first column of its group

  constexpr explicit StepShape(int n) : bases{} {
    for (int step = 0; step < kMostSpan; ++step)
      for (int slot = 0; slot <= kStep; ++slot) bases[step][slot] = static_cast<Base>(step * kStep + slot / n * M);
  }
};

// Steps of a round of the loop: those of a register of x, and so many that a lone sum has eight chains.
template <class Shape, class Product, int T, int NB>
constexpr int round_steps() {
  constexpr int kChained = T * NB == 1 && Shape::kStatic ? 8 * Product::kSlotsOfSum / Shape::kSlots : 1;
  constexpr int kSpan = Product::template kSpan<Shape, NB>;
  return kChained > kSpan ? kChained : kSpan;
}

// The chains of each sum together, to y with the bias where it is for the kernel to write, else to args.sums. `Y` reads
// and writes 16 elements of PermuteSet::y_dtype.
template <class Y, int T, int NB, int C>
inline void end_micro(const PermuteArgs& args, const __m512 (&sums)[T][NB][C]) {
  SPARSECOMP_UNROLL
  for (int t = 0; t < T; ++t) {
    const __m512 bias = args.y && args.bias ? Y::load(args.bias, t * kTile) : _mm512_setzero_ps();
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      __m512 sum = sums[t][b][0];
      SPARSECOMP_UNROLL
      for (int c = 1; c < C; ++c) sum = _mm512_add_ps(sum, sums[t][b][c]);
      if (args.y)
        Y::store(_mm512_add_ps(sum, bias), args.y, b * args.ldy + t * kTile);
      else
        _mm512_storeu_ps(args.sums + (b * T + t) * kTile, sum);
    }
  }
}

// T tiles by NB batch columns. `Product` multiplies a pair of slots of one tile:
//   Product::kSpan<Shape, NB>     steps of x that a register holds
//   Product::X, Product::Vector   element of x, and what load<span>(pointer) makes of it: a register, or nothing yet
//   Product::kSlotsOfSum          slots that one instruction adds to a sum, a unit: 1 or 2
//   Product::Y                    what it writes: kDtype, and load and store of 16 elements
//   Product::Base                 what holds the first column of a slot's group
//   Product::kReadsBases<M>       whether the bases of a step find no registers beside the most sums
//   Product::kAhead<Shape, NB>    whether the indices of a step are made during the one before it
//   Product::first<Shape>(word)   an index word as columns() wants it; later<Shape>(word, slots): so many slots later
//   Product::columns<M, Shape, NB>(word, bases)   indices of the unit in the lowest bits, as its permutes want them
//   Product::pair<Shape>(block, slot, odd, indices, chain, xs, sums)   `odd`: slot + 1 exists too
template <class Product, int M, int N, int T, int NB>
void micro(const PermuteArgs& args) {
  using Shape = StepShape<M, N, typename Product::Base>;
  // few columns: several sums each, or the latency of the multiply-add shows
  constexpr int kChains = T * NB == 1 ? 8 : NB <= 2 ? 2 : 1;
  constexpr int kSpan = Product::template kSpan<Shape, NB>, kRound = round_steps<Shape, Product, T, NB>();
  constexpr int kUnit = Product::kSlotsOfSum;
  constexpr bool kAhead = Product::template kAhead<Shape, NB>;
  static_assert(!kAhead || (Shape::kStatic && Shape::kSlots % 2 == 0), "whole pairs, of a known number");
  const Geometry& g = *args.geometry;
  constexpr Shape known(N == 0 ? 1 : N);
  const Shape shape = N == 0 ? Shape(g.n) : known;
  const int full_words = Shape::kStatic ? Shape::kFullWords : g.full_words;
  const int rest_bytes = Shape::kStatic ? Shape::kRestBytes : g.rest_bytes;
  constexpr int kBlockBytes = Shape::kStatic ? Shape::kSlots * Product::kWeightBytes * kTile : 0;
  static_assert(kBlockBytes % 64 == 0, "kernels of their own take whole lines of values: 4 must divide 16 N / M");
  const int64_t value_bytes = Shape::kStatic ? kBlockBytes : g.value_bytes;
  const int64_t metadata_bytes = Shape::kStatic ? Shape::kMetadataBytes : g.metadata_bytes;
  const uint8_t* values = args.values;
  const uint8_t* metadata = args.metadata;
  // copied, because the compiler must take stores of indices for changes of args
  const int64_t value_stride = args.value_stride, metadata_stride = args.metadata_stride;
  const int64_t ldx = args.ldx;
  const auto* x = static_cast<const typename Product::X*>(args.x);

  Prefetcher prefetch(args, value_bytes, metadata_bytes, T * NB == 1 ? kPrefetchOneTile : kPrefetchBytes);

  __m512 sums[T][NB][kChains];
  SPARSECOMP_UNROLL
  for (int t = 0; t < T; ++t) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      sums[t][b][0] = args.add ? _mm512_loadu_ps(args.sums + (b * T + t) * kTile) : _mm512_setzero_ps();
      SPARSECOMP_UNROLL
      for (int c = 1; c < kChains; ++c) sums[t][b][c] = _mm512_setzero_ps();
    }
  }

  __m512i word[T];
  const auto load_words = [&](const uint8_t* block, int i) __attribute__((always_inline)) {
    SPARSECOMP_UNROLL
    for (int t = 0; t < T; ++t)
      word[t] = Product::template first<Shape>(load_index_word(block + t * metadata_stride, i, full_words, rest_bytes));
  };
  // Calls each(slot, odd) for every pair of a step. Positions come from the metadata at `block`; those of the pair are
  // in the lowest bits of word[t], provided that each() moves on.
  const auto walk = [&](const uint8_t* block, const auto& each) __attribute__((always_inline)) {
    if constexpr (Shape::kStatic) {
      load_words(block, 0);
      SPARSECOMP_UNROLL
      for (int slot = 0; slot < Shape::kSlots; slot += 2) each(slot, slot + 1 < Shape::kSlots);
    } else {
      for (int i = 0, slot = 0; i < g.words; ++i) {
        load_words(block, i);
        const int end = g.slots < slot + Shape::kWordSlots ? g.slots : slot + Shape::kWordSlots;
        for (; slot + 1 < end; slot += 2) each(slot, true);
        if (slot < end) each(slot++, false);
      }
    }
  };
  // here and not later: the shift would keep the next pair waiting
  const auto move_on = [&](int t)
                           __attribute__((always_inline)) { word[t] = Product::template later<Shape>(word[t], 2); };
  // Made ahead: the indices of the next step, and those of this one that are not used yet. A permute that had to wait
  // for its index would keep those behind it waiting.
  alignas(64) uint8_t indices[kAhead ? Shape::kSlots / kUnit * T * 64 : 1];
  uint8_t* ahead = indices;
  const auto place = [&](int t, int slot) { return ahead + (slot / kUnit * T + t) * 64; };
  // The index of the unit at `slot`, `later` slots behind the first of its pair.
  const auto make_index = [&](int t, int slot, int later,
                              const typename Product::Base* bases) __attribute__((always_inline)) {
    return Product::template columns<M, Shape, NB>(Product::template later<Shape>(word[t], later), bases + slot);
  };
  if constexpr (kAhead) {
    if (args.steps > 0) {
      walk(metadata, [&](int slot, bool) __attribute__((always_inline)) {
        SPARSECOMP_UNROLL
        for (int t = 0; t < T; ++t) {
          for (int u = 0; u < 2; u += kUnit)
            _mm512_store_si512(place(t, slot + u), make_index(t, slot + u, u, shape.bases[0]));
          move_on(t);
        }
      });
    }
  }

  const uint8_t* last_metadata = metadata + (args.steps > 0 ? args.steps - 1 : 0) * metadata_bytes;
  // `first`: of the round
  const auto multiply_steps = [&](int first, int count) __attribute__((always_inline)) {
    typename Product::Vector xs[NB];
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) xs[b] = Product::template load<kSpan>(x + b * ldx);
    SPARSECOMP_UNROLL
    for (int step = 0; step < count; ++step) {
      if (args.stream) {
        SPARSECOMP_UNROLL
        for (int t = 0; t < T; ++t) prefetch.template tile<kBlockBytes>(t);
        prefetch.advance();
      }
      const typename Product::Base* bases = shape.bases[kAhead ? (step + 1) % kSpan : step];
      // read where they are used: in registers they would push out sums
      if (Product::template kReadsBases<M> && T > 1 && NB == kMostColumns) __asm__("" : "+r"(bases));
      // another address, for all GCC knows: it would keep the indices in registers and spill sums for them
      if (kAhead) __asm__("" : "+r"(ahead));
      walk(kAhead && metadata < last_metadata ? metadata + metadata_bytes : metadata,
           [&](int slot, bool odd) __attribute__((always_inline)) {
             const int chain = Shape::kStatic ? ((first + step) * Shape::kSlots + slot) / 2 % kChains : 0;
             SPARSECOMP_UNROLL
             for (int t = 0; t < T; ++t) {
               __m512i index[2 / kUnit];
               for (int u = 0; u < (odd ? 2 : 1); u += kUnit) {
                 if (kAhead) {
                   index[u] = _mm512_load_si512(place(t, slot + u));
                   _mm512_store_si512(place(t, slot + u), make_index(t, slot + u, u, bases));
                 } else {
                   index[u] = make_index(t, slot + u, u, bases);
                 }
               }
               move_on(t);
               Product::template pair<Shape>(values + t * value_stride, slot, odd, index, chain, xs, sums[t]);
             }
           });
      values += value_bytes;
      metadata += metadata_bytes;
    }
    x += kSpan * kStep;
  };
  int64_t step = 0;
  for (; step + kRound <= args.steps; step += kRound) {
    SPARSECOMP_UNROLL
    for (int first = 0; first < kRound; first += kSpan) multiply_steps(first, kSpan);
  }
  if constexpr (kRound > kSpan) {
    for (; step + kSpan <= args.steps; step += kSpan) multiply_steps(0, kSpan);
  }
  if constexpr (kSpan > 1) {
    if (step < args.steps) multiply_steps(0, 1);
  }

  end_micro<typename Product::Y>(args, sums);
}

template <class Product, int M, int N, int T, int NB>
constexpr void fill_columns(PermuteMicro* row) {
  row[NB] = micro<Product, M, N, T, NB>;
  if constexpr (NB > 1) fill_columns<Product, M, N, T, NB - 1>(row);
}

template <class Product, int M, int N>
constexpr PermuteSet make_set() {
  PermuteSet set{};
  set.x_dtype = Product::kXDtype;
  set.span = Product::kXDtype == SPARSECOMP_F32 ? 1 : kMostSpan;
  set.column_tiles = N == 0 ? 2 : 1;
  set.y_dtype = Product::Y::kDtype;
  fill_columns<Product, M, N, 1, kMostColumns>(set.micro[1]);
  fill_columns<Product, M, N, 2, kMostColumns>(set.micro[2]);
  return set;
}

template <class Product, int M, int N>
const PermuteSet* set_of() {
  static constexpr PermuteSet set = make_set<Product, M, N>();
  return &set;
}

// The kernels of a pattern: their own where people prune to it, otherwise those of its group size, which lose 3-25% in
// fp32 and 6-50% in bf16 to loops of unknown length, most at one column. `Line`: of the list.
template <std::size_t Line, class Product>
const PermuteSet* select_for(const Geometry& g) {
  return own_or_group_kernels<Line, PermuteSet>(g,
                                                [](auto pattern) { return set_of<Product, pattern.kM, pattern.kN>(); });
}

}  // namespace
}  // namespace sparsecomp
