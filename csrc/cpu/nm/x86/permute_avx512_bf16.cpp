// bf16 products with the AVX-512 BF16 dot product: a 32-bit lane holds two kept weights of a row, a word permute brings
// the two activations beside each other, one instruction multiplies and adds both in fp32. Other types as in
// permute_avx512.cpp.
#include <cstring>

#include "common/x86/convert_avx512.hpp"
#include "nm/kernels.hpp"
#include "nm/x86/panel_sets.hpp"
#include "nm/x86/permute_avx512.hpp"

namespace sparsecomp {
namespace {

struct Bf16Y {
  static constexpr int kDtype = SPARSECOMP_BF16;
  static __m512 load(const void* from, int64_t index) {
    return widen_vector(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + index)), kDtype);
  }
  // Denormal numbers become zero, as in the dot product.
  static void store(__m512 value, void* to, int64_t index) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + index),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
};

// Registers for T = 2, NB = 8: 16 sums, 8 of activations, 2 index words, a value, an index and the permuted
// activations.
struct DotProduct {
  using X = uint16_t;
  using Vector = __m512i;
  using Base = uint16_t;
  using Y = Bf16Y;
  static constexpr int kXDtype = SPARSECOMP_BF16;
  static constexpr int kWeightBytes = 2;
  static constexpr int kSlotsOfSum = 2;

  // 32 activations; or 16 twice, so that bit 4 of a word index does not matter: that saves groups of 16 a mask, but
  // such a load waits for the pipes of the permutes.
  template <int Span>
  static Vector load(const X* x) {
    if constexpr (Span == 2) return _mm512_loadu_si512(x);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  template <int M>
  static constexpr bool kReadsBases = M < 8;

  // Positions of at most 16 bits lie in both halves of a lane, each half beginning with its own.
  template <class Shape>
  static constexpr bool kHalves = Shape::kStatic && Shape::kSlots * Shape::kBits <= 16;

  template <class Shape, int NB>
  static constexpr bool kAhead = Shape::kStatic && NB > 3;

  // With 32 activations at once 8:16 needs a mask, for which it has time only where it decodes ahead. Loops of unknown
  // length gain nothing.
  template <class Shape, int NB>
  static constexpr int kSpan =
      Shape::kStatic && (kAhead<Shape, NB> || Shape::kSlots * Shape::kBits <= 24) ? kMostSpan : 1;

  template <class Shape>
  static __m512i first(__m512i word) {
    return kHalves<Shape> ? in_halves<Shape>(word) : word;
  }
  template <class Shape>
  static __m512i later(__m512i word, int slots) {
    if (slots == 0) return word;
    return kHalves<Shape> ? _mm512_srli_epi16(word, slots * Shape::kBits)
                          : _mm512_srli_epi32(word, slots * Shape::kBits);
  }

  // For an odd number of slots the second weight of the last pair is stored as zero, and its activation must be zero
  // too: it belongs to no slot of the row, and zero times Inf is NaN.
  template <class Shape, int NB, int C>
  static inline void pair(const uint8_t* block, int slot, bool odd, const __m512i (&indices)[1], int chain,
                          const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    const auto value = reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + slot / 2 * kTile * 4));
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      const __m512i activations = odd ? _mm512_permutexvar_epi16(indices[0], xs[b])
                                      : _mm512_maskz_permutexvar_epi16(0x55555555, indices[0], xs[b]);
      sums[b][chain] = _mm512_dpbf16_ps(sums[b][chain], value, reinterpret_cast<__m512bh>(activations));
    }
  }

  // Word indices of two slots, the first in the low half, the second in the high one.
  template <int M, class Shape, int NB>
  static __m512i columns(__m512i word, const Base* bases) {
    int32_t base;
    std::memcpy(&base, bases, sizeof(base));
    const __m512i both = kHalves<Shape> ? word : in_halves<Shape>(word);
    if (M == 16 && kSpan<Shape, NB> == 1) return both;
    // (both & mask) | base
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi32((M - 1) * 0x10001), _mm512_set1_epi32(base), 0xea);
  }

 private:
  template <class Shape>
  static __m512i in_halves(__m512i word) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, word, _mm512_slli_epi32(word, 16 - Shape::kBits));
  }
};

const PermuteSet* select(const Geometry& g, const Processor& processor) {
  if (g.dtype != SPARSECOMP_BF16) return kNmAvx512.select(g, processor);
  return select_for<line_of("avx512_bf16", "permute"), DotProduct>(g);
}

}  // namespace

constexpr NmKernels kNmAvx512Bf16 = {select, select_panels_avx512_bf16};

}  // namespace sparsecomp
