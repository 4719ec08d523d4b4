// Int8 products in NEON registers: one word of 4 rows, a quarter of a tile. A lookup in the 16 activations of a step
// finds what every weight meets. Included by the files of base NEON and of its dot products, each of which says how
// registers of words are multiplied; everything here is local to the file that includes it.
#pragma once

#include <arm_neon.h>

#include <limits>
#include <utility>

#include "common/measure.hpp"
#include "common/unroll.hpp"
#include "int8/linear.hpp"
#include "int8/stream.hpp"

namespace sparsecomp::int8 {
namespace {

constexpr int kWordBytes = kTile * kWordWeights;
constexpr int kQuarter = kTile / 4;
constexpr int kQuarterBytes = kWordBytes / 4;
// Of the 32 registers, those that hold sums; the others hold weights, their columns and activations.
constexpr int kSumRegisters = 16;

inline int8x16_t load(const uint8_t* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }

inline int32_t* partial_at(const MicroArgs& args, int quarter, int b) {
  return args.partial + b * kTile + quarter * kQuarter;
}

// y, or sums, of one register of sums: rows 4 `quarter` and on.
inline void end_row(const MicroArgs& args, int quarter, int b, int32x4_t sums) {
  const int row = quarter * kQuarter;
  const int32x4_t exact = vmlsq_n_s32(sums, vld1q_s32(args.row_sums + row), args.rows[b].zero_point);
  const float32x4_t sum = vmulq_n_f32(vcvtq_f32_s32(exact), args.rows[b].scale);
  if (!args.y) return vst1q_f32(args.sums + b * kTile + row, sum);
  const float32x4_t scale = args.scales ? vld1q_f32(args.scales + row) : vdupq_n_f32(1);
  const float32x4_t bias = args.bias ? vld1q_f32(args.bias + row) : vdupq_n_f32(0);
  vst1q_f32(args.y + b * args.ldy + row, vfmaq_f32(bias, sum, scale));
}

// Q quarters of a tile, from quarter `first` on, by NB batch columns. `Product` is made from the registers of a pair of
// words, and adds their products with the activations that they meet to Sums: `add` takes these, looked up, and
// `add_columns` the columns of the step, which dense weights meet from column 4 `word` on.
template <class Product, int W, bool kDense, int Q, int NB>
inline void multiply_quarters(const MicroArgs& args, int first, bool ask) {
  constexpr int kSteps = W % 2 ? 2 : 1, kRoundWords = kSteps * W;
  constexpr int kValueBytes = kRoundWords * kWordBytes, kMetadataBytes = kDense ? 0 : kValueBytes / 2;
  const int64_t ldx = args.ldx;
  const uint8_t *values = args.values + first * kQuarterBytes, *x = args.x;
  const uint8_t* metadata = kDense ? nullptr : args.metadata + first * kQuarterBytes;
  Stream stream(args, kValueBytes, kMetadataBytes);

  typename Product::Sums sums[Q][NB];
  SPARSECOMP_UNROLL
  for (int q = 0; q < Q; ++q) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) sums[q][b] = Product::zero();
  }

  for (int64_t round = 0; round < args.rounds; ++round) {
    if (ask) stream.template next<1, kValueBytes, kMetadataBytes>();
    SPARSECOMP_UNROLL
    for (int word = 0; word < kRoundWords; word += 2) {
      SPARSECOMP_UNROLL
      for (int q = 0; q < Q; ++q) {
        const uint8_t* weights = values + word * kWordBytes + q * kQuarterBytes;
        const Product product(load(weights), load(weights + kWordBytes));
        const uint8x16_t pair = kDense ? vdupq_n_u8(0) : vld1q_u8(metadata + word / 2 * kWordBytes + q * kQuarterBytes);
        const uint8x16_t even = vandq_u8(pair, vdupq_n_u8(15)), odd = vshrq_n_u8(pair, 4);
        SPARSECOMP_UNROLL
        for (int b = 0; b < NB; ++b) {
          const uint8_t *step = x + b * ldx + word / W * kStep, *next = x + b * ldx + (word + 1) / W * kStep;
          sums[q][b] = kDense ? product.add_columns(step, word, sums[q][b])
                              : product.add(vqtbl1q_s8(load(step), even), vqtbl1q_s8(load(next), odd), sums[q][b]);
        }
      }
    }
    values += kValueBytes;
    if (!kDense) metadata += kMetadataBytes;
    x += kSteps * kStep;
  }

  SPARSECOMP_UNROLL
  for (int q = 0; q < Q; ++q) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      int32x4_t sum = Product::total(sums[q][b]);
      if (args.add) sum = vaddq_s32(sum, vld1q_s32(partial_at(args, first + q, b)));
      if (args.done)
        end_row(args, first + q, b, sum);
      else
        vst1q_s32(partial_at(args, first + q, b), sum);
    }
  }
}

// One tile by NB columns: as many quarters at once as there are registers for the sums of.
template <class Product, int W, bool kDense, int NB>
void micro(const MicroArgs& args) {
  constexpr int kFit = kSumRegisters / (NB * Product::kRegisters);
  constexpr int Q = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  for (int first = 0; first < 4; first += Q)
    multiply_quarters<Product, W, kDense, Q, NB>(args, first, args.stream && first == 0);
}

template <class Product, int W, bool kDense, int... Before>
constexpr MicroSet make_set(std::integer_sequence<int, Before...>) {
  MicroSet set{true, 1, {}};
  ((set.micro[1][Before + 1] = micro<Product, W, kDense, Before + 1>), ...);
  return set;
}

template <class Product, int W, bool kDense>
const MicroSet* set_of() {
  static constexpr MicroSet set = make_set<Product, W, kDense>(std::make_integer_sequence<int, kMostColumns>());
  return &set;
}

template <class Product>
const MicroSet* select(const Geometry& g, int64_t) {
  if (g.dense) return set_of<Product, 4, true>();
  switch (g.words) {
    case 1:
      return set_of<Product, 1, false>();
    case 2:
      return set_of<Product, 2, false>();
    case 3:
      return set_of<Product, 3, false>();
    default:
      return set_of<Product, 4, false>();
  }
}

template <class Product>
double operations(double seconds) {
  constexpr int kChains = kSumRegisters / Product::kRegisters;
  int8x16_t weights = vdupq_n_s8(1), activations = weights;
  __asm__ volatile("" : "+w"(weights));  // of any content: GCC does not multiply by 1
  const Product product(weights, weights);
  return measure_rate(seconds, 2.0 * 2 * kQuarterBytes * kChains, [&](int64_t rounds) {
    typename Product::Sums sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = Product::zero();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        __asm__ volatile("" : "+w"(activations));  // else products are the same every time
        sums[i] = product.add(activations, activations, sums[i]);
      }
    }
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) __asm__ volatile("" : : "w"(Product::total(sums[i])));  // keeps the work
  });
}

constexpr int kFloats = 4;

// Minimum and maximum of NEON are NaN where an argument is.
bool range(const float* x, int64_t count, float* smallest, float* largest) {
  constexpr int kChains = 4;
  float32x4_t low[kChains], high[kChains];
  SPARSECOMP_UNROLL
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = vdupq_n_f32(0);
  const auto take = [&](int c, float32x4_t v) __attribute__((always_inline)) {
    low[c] = vminq_f32(low[c], v);
    high[c] = vmaxq_f32(high[c], v);
  };
  int64_t i = 0;
  for (; i + kChains * kFloats <= count; i += kChains * kFloats) {
    SPARSECOMP_UNROLL
    for (int c = 0; c < kChains; ++c) take(c, vld1q_f32(x + i + c * kFloats));
  }
  for (; i < count; ++i) take(0, vdupq_n_f32(x[i]));
  *smallest = vminvq_f32(vminq_f32(vminq_f32(low[0], low[1]), vminq_f32(low[2], low[3])));
  *largest = vmaxvq_f32(vmaxq_f32(vmaxq_f32(high[0], high[1]), vmaxq_f32(high[2], high[3])));
  constexpr float kMost = std::numeric_limits<float>::max();
  return *smallest >= -kMost && *largest <= kMost;
}

void round(const float* x, int64_t count, float inverse, int zero_point, const MicroSet&, uint8_t* to) {
  const int16x8_t zero = vdupq_n_s16(static_cast<int16_t>(zero_point));
  const auto integers = [&](const float* from) __attribute__((always_inline)) {
    int16x4_t part[4];
    SPARSECOMP_UNROLL
    for (int c = 0; c < 4; ++c)
      part[c] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + c * kFloats), inverse)));
    const int8x8_t low = vqmovn_s16(vqaddq_s16(vcombine_s16(part[0], part[1]), zero));
    const int8x8_t high = vqmovn_s16(vqaddq_s16(vcombine_s16(part[2], part[3]), zero));
    return vreinterpretq_u8_s8(vmaxq_s8(vcombine_s8(low, high), vdupq_n_s8(-kLargest)));
  };
  int64_t i = 0;
  for (; i + 4 * kFloats <= count; i += 4 * kFloats) vst1q_u8(to + i, integers(x + i));
  if (i < count) {
    float numbers[4 * kFloats] = {};
    for (int64_t j = i; j < count; ++j) numbers[j - i] = x[j];
    vst1q_u8(to + i, integers(numbers));
  }
}

}  // namespace
}  // namespace sparsecomp::int8
