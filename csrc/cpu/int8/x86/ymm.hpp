// Int8 products in registers of 256 bits: one word of 8 rows, half a tile. Included by the files of AVX2 and of
// AVX-VNNI, each of which says how a register of words is multiplied; everything here is local to the file that
// includes it.
#pragma once

#include <immintrin.h>

#include "common/measure.hpp"
#include "common/unroll.hpp"
#include "int8/linear.hpp"
#include "int8/stream.hpp"

namespace sparsecomp::int8 {
namespace {

constexpr int kWordBytes = kTile * kWordWeights;
constexpr int kHalf = kTile / 2;
constexpr int kHalfBytes = kWordBytes / 2;

inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// The columns of word `word` of a round; `metadata` is that of the half.
inline __m256i word_columns(const uint8_t* metadata, int word) {
  const __m256i pair = load(metadata + word / 2 * kWordBytes);
  return _mm256_and_si256(word % 2 ? _mm256_srli_epi16(pair, 4) : pair, _mm256_set1_epi8(15));
}

inline __m256i* partial_at(const MicroArgs& args, int half, int b) {
  return reinterpret_cast<__m256i*>(args.partial + b * kTile + half * kHalf);
}

// y, or sums, of one register of sums: rows 8 `half` and on.
inline void end_row(const MicroArgs& args, int half, int b, __m256i sums) {
  const int row = half * kHalf;
  const auto* row_sums = reinterpret_cast<const __m256i*>(args.row_sums + row);
  const __m256i offset = _mm256_mullo_epi32(_mm256_loadu_si256(row_sums), _mm256_set1_epi32(args.rows[b].zero_point));
  const __m256 sum =
      _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums, offset)), _mm256_set1_ps(args.rows[b].scale));
  if (!args.y) return _mm256_storeu_ps(args.sums + b * kTile + row, sum);
  const __m256 scale = args.scales ? _mm256_loadu_ps(args.scales + row) : _mm256_set1_ps(1.0f);
  const __m256 bias = args.bias ? _mm256_loadu_ps(args.bias + row) : _mm256_setzero_ps();
  _mm256_storeu_ps(args.y + b * args.ldy + row, _mm256_fmadd_ps(sum, scale, bias));
}

// H halves of a tile, from half `first` on, by NB batch columns. `Product` is made from a register of weights and adds
// their products with activations to sums.
template <class Product, int W, bool kDense, int H, int NB>
inline void multiply_halves(const MicroArgs& args, int first, bool ask) {
  constexpr int kSteps = W % 2 ? 2 : 1, kRoundWords = kSteps * W;
  constexpr int kValueBytes = kRoundWords * kWordBytes, kMetadataBytes = kDense ? 0 : kValueBytes / 2;
  constexpr int kChains = H * NB <= 2 ? (kRoundWords < 4 ? kRoundWords : 4) : 1;
  const int64_t ldx = args.ldx;
  const uint8_t *values = args.values + first * kHalfBytes, *metadata = args.metadata + first * kHalfBytes, *x = args.x;
  Stream stream(args, kValueBytes, kMetadataBytes);

  __m256i sums[H][NB][kChains];
  SPARSECOMP_UNROLL
  for (int h = 0; h < H; ++h) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      SPARSECOMP_UNROLL
      for (int c = 0; c < kChains; ++c) sums[h][b][c] = _mm256_setzero_si256();
      if (args.add) sums[h][b][0] = _mm256_loadu_si256(partial_at(args, first + h, b));
    }
  }

  for (int64_t round = 0; round < args.rounds; ++round) {
    if (ask) stream.template next<1, kValueBytes, kMetadataBytes>();
    SPARSECOMP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      SPARSECOMP_UNROLL
      for (int w = 0; w < W; ++w) {
        SPARSECOMP_UNROLL
        for (int h = 0; h < H; ++h) {
          const int word = step * W + w;
          const Product product(load(values + word * kWordBytes + h * kHalfBytes));
          const __m256i columns = kDense ? _mm256_setzero_si256() : word_columns(metadata + h * kHalfBytes, word);
          SPARSECOMP_UNROLL
          for (int b = 0; b < NB; ++b) {
            const uint8_t* from = x + b * ldx + step * kStep;
            const __m256i activations =
                kDense ? _mm256_set1_epi32(reinterpret_cast<const int*>(from)[w])
                       : _mm256_shuffle_epi8(
                             _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                             columns);
            __m256i& sum = sums[h][b][word % kChains];
            sum = product.add(activations, sum);
            __asm__ volatile("" : "+x"(sum));  // in this order: GCC would shuffle ahead and run out of registers
          }
        }
      }
    }
    values += kValueBytes;
    metadata += kMetadataBytes;
    x += kSteps * kStep;
  }

  SPARSECOMP_UNROLL
  for (int h = 0; h < H; ++h) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      __m256i sum = sums[h][b][0];
      SPARSECOMP_UNROLL
      for (int c = 1; c < kChains; ++c) sum = _mm256_add_epi32(sum, sums[h][b][c]);
      if (args.done)
        end_row(args, first + h, b, sum);
      else
        _mm256_storeu_si256(partial_at(args, first + h, b), sum);
    }
  }
}

// One tile by NB columns. Where there are registers for the sums of both halves they share a pass over the weights.
template <class Product, int W, bool kDense, int NB>
inline void multiply(const MicroArgs& args) {
  if constexpr (NB <= 3) {
    multiply_halves<Product, W, kDense, 2, NB>(args, 0, args.stream);
  } else {
    multiply_halves<Product, W, kDense, 1, NB>(args, 0, args.stream);
    multiply_halves<Product, W, kDense, 1, NB>(args, 1, false);
  }
}

// The sets of micro-kernels of a table: Table::micro<W, kDense, NB> for all numbers of words and columns.
template <class Table, int W, bool kDense>
constexpr MicroSet make_set() {
  MicroSet set{kDense && Table::kSignedWhereDense, 1, {}};
  Micro(&row)[kMostColumns + 1] = set.micro[1];
  row[1] = Table::template micro<W, kDense, 1>;
  row[2] = Table::template micro<W, kDense, 2>;
  row[3] = Table::template micro<W, kDense, 3>;
  row[4] = Table::template micro<W, kDense, 4>;
  row[5] = Table::template micro<W, kDense, 5>;
  row[6] = Table::template micro<W, kDense, 6>;
  row[7] = Table::template micro<W, kDense, 7>;
  row[8] = Table::template micro<W, kDense, 8>;
  return set;
}

template <class Table, int W, bool kDense>
const MicroSet* set_of() {
  static constexpr MicroSet set = make_set<Table, W, kDense>();
  return &set;
}

template <class Table>
const MicroSet* select_of(const Geometry& g) {
  if (g.dense) return set_of<Table, 4, true>();
  switch (g.words) {
    case 1:
      return set_of<Table, 1, false>();
    case 2:
      return set_of<Table, 2, false>();
    case 3:
      return set_of<Table, 3, false>();
    default:
      return set_of<Table, 4, false>();
  }
}

// The rate of a product that takes activations as they are.
template <class Product>
double operations_of(double seconds) {
  constexpr int kChains = 8;
  __m256i activations = _mm256_set1_epi8(1);
  const Product product(activations);
  return measure_rate(seconds, 2.0 * kWordWeights * kHalf * kChains, [&](int64_t rounds) {
    __m256i sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_setzero_si256();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        __asm__ volatile("" : "+x"(activations));  // else products are the same every time
        sums[i] = product.add(activations, sums[i]);
        __asm__ volatile("" : "+x"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

}  // namespace
}  // namespace sparsecomp::int8
