// Int8 products on AVX2 without VNNI: bytes are multiplied and added in pairs to 16 bits, which saturate, and pairs of
// these to 32 bits. Three ways, all exact:
//   narrow pairs   activations of 0 to 255 times weights whose pairs fit 16 bits, as the layout has nearly all
//   any pairs      activations of -127 to 127: their sign goes to the weight, their size is at most 127, and
//                  2 * 127 * 128 fits 16 bits. One instruction more, and one to take 128 off
//   dense          the same, with activations stored as they are; no shuffle
#include <immintrin.h>

#include "int8/x86/round_avx2.hpp"
#include "int8/x86/ymm.hpp"

namespace sparsecomp::int8 {
namespace {

inline __m256i add_pairs(__m256i pairs, __m256i sum) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

class NarrowProduct {
 public:
  explicit NarrowProduct(__m256i weights) : weights_(weights) {}
  __m256i add(__m256i activations, __m256i sum) const {
    return add_pairs(_mm256_maddubs_epi16(activations, weights_), sum);
  }

 private:
  __m256i weights_;
};

// Sizes of weights are unsigned, so that 128 is one. An activation is never -128, whose sign cannot be changed.
class SignedProduct {
 public:
  explicit SignedProduct(__m256i weights) : weights_(weights), sizes_(_mm256_abs_epi8(weights)) {}
  __m256i add(__m256i activations, __m256i sum) const {
    return add_pairs(_mm256_maddubs_epi16(sizes_, _mm256_sign_epi8(activations, weights_)), sum);
  }

 private:
  __m256i weights_, sizes_;
};

class WideProduct {
 public:
  explicit WideProduct(__m256i weights) : product_(weights) {}
  __m256i add(__m256i activations, __m256i sum) const {
    return product_.add(_mm256_xor_si256(activations, _mm256_set1_epi8(-128)), sum);
  }

 private:
  SignedProduct product_;
};

struct Table {
  static constexpr bool kSignedWhereDense = true;

  template <int W, bool kDense, int NB>
  static void micro(const MicroArgs& args) {
    if constexpr (kDense)
      multiply<SignedProduct, W, kDense, NB>(args);
    else if (args.narrow)
      multiply<NarrowProduct, W, kDense, NB>(args);
    else
      wide<W, NB>(args);
  }

 private:
  // The sums of a narrow tile would be those of activations with 128 added.
  template <int W, int NB>
  static void wide(const MicroArgs& args) {
    MicroArgs as_signed = args;
    RoundedRow rows[NB];
    for (int b = 0; b < NB; ++b) rows[b] = {args.rows[b].scale, args.rows[b].zero_point - 128};
    as_signed.rows = rows;
    multiply<WideProduct, W, false, NB>(as_signed);
  }
};

const MicroSet* select(const Geometry& g, int64_t) { return select_of<Table>(g); }

}  // namespace

constexpr Kernels kAvx2 = {select, range, round, operations_of<NarrowProduct>};

}  // namespace sparsecomp::int8
