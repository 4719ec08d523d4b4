// bf16 products with the AVX-512 BF16 dot product: a 32-bit lane holds two kept weights of a row, a word permute brings
// the two activations beside each other, one instruction multiplies and adds both in fp32. Other types as in
// avx512.cpp.
#include "../dispatch.hpp"
#include "../measure.hpp"
#include "avx512_common.hpp"
#include "panel_sets.hpp"

namespace sparsecomp {
namespace {

// Registers for T = 2, NB = 8: 16 sums, 8 activations (the 16 of a step, twice, so that bit 4 of a word index does not
// matter), 2 index words, a value, an index and the permuted activations.
struct DotProduct {
  using X = uint16_t;
  using Vector = __m512i;
  static constexpr int kXDtype = SPARSECOMP_BF16;
  static constexpr int kWeightBytes = 2;

  static Vector load(const X* x) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  // For an odd number of slots the second weight of the last pair is stored as zero, and its activation must be zero
  // too: it belongs to no slot of the row, and zero times Inf is NaN.
  template <int M, class Shape, int NB, int C>
  static inline void pair(const uint8_t* block, int slot, bool odd, __m512i word, const Shape& shape, int chain,
                          const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    const auto value = reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + slot / 2 * kTile * 4));
    const __m512i index = columns < M,
                  M == 4 && Shape::kStatic > (word, Shape::kBits, shape.base(slot) | shape.base(slot + 1) << 16);
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      const __m512i activations =
          odd ? _mm512_permutexvar_epi16(index, xs[b]) : _mm512_maskz_permutexvar_epi16(0x55555555, index, xs[b]);
      sums[b][chain] = _mm512_dpbf16_ps(sums[b][chain], value, reinterpret_cast<__m512bh>(activations));
    }
  }

 private:
  // Word indices of two slots, whose fields are lowest in `word`: the first in the low half, the second in the high
  // one.
  template <int M, bool kTable>
  static __m512i columns(__m512i word, int bits, int bases) {
    if (kTable) {
      // both positions of a 2:4 group are one of 16 values: looked up, and the permute reads the low four bits only
      const __m512i pairs = _mm512_setr_epi32(0x00000, 0x00001, 0x00002, 0x00003, 0x10000, 0x10001, 0x10002, 0x10003,
                                              0x20000, 0x20001, 0x20002, 0x20003, 0x30000, 0x30001, 0x30002, 0x30003);
      return _mm512_or_si512(_mm512_permutexvar_epi32(word, pairs), _mm512_set1_epi32(bases));
    }
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, word, _mm512_slli_epi32(word, 16 - bits));
    if (M == 16) return both;
    // (both & mask) | bases
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi32((M - 1) * 0x10001), _mm512_set1_epi32(bases), 0xea);
  }
};

const KernelSet* select(const Geometry& g) {
  return g.dtype == SPARSECOMP_BF16 ? select_for<DotProduct>(g) : kAvx512.select(g);
}

double flops(int dtype, double seconds) {
  if (dtype != SPARSECOMP_BF16) return kAvx512.flops(dtype, seconds);
  constexpr int kChains = 16;
  const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
  return measure_rate(seconds, 4.0 * kTile * kChains, [=](int64_t rounds) {
    __m512 sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
        __asm__ volatile("" : "+v"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

// What the two sets share is called through the table of the other: copying its pointers would be code that runs at
// load, compiled for AVX-512, also on machines that have none.
void widen(const void* from, int dtype, float* to, int64_t count) { kAvx512.widen(from, dtype, to, count); }
void finish(const FinishArgs& args) { kAvx512.finish(args); }

}  // namespace

constexpr Isa kAvx512Bf16 = {"avx512_bf16", select, select_panels_avx512_bf16, widen, finish, flops, read_stream};

}  // namespace sparsecomp
