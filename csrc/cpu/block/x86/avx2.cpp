// Block-sparse products on AVX2 + FMA + F16C: a vector of weights is two registers.
// 6 columns: 12 sums, 2 weights, an activation that both halves share unless a row of the vector is 16 columns.
#include <immintrin.h>

#include "block/micro.hpp"

namespace sparsecomp {
namespace {

struct Avx2Lanes {
  struct Register {
    __m256 low, high;
  };

  static Register zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Register add(Register a, Register b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Register multiply_add(Register a, Register b, Register sum) {
    return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
  }

  template <int Dtype>
  static Register load(const uint8_t* from) {
    constexpr int kHalf = Dtype == SPARSECOMP_F32 ? 32 : 16;
    return {load_half<Dtype>(from), load_half<Dtype>(from + kHalf)};
  }

  template <int LC>
  static Register spread(const float* from) {
    if (LC == 16) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    const __m256 both = spread_half<LC>(from);
    return {both, both};
  }

  template <int LC, int NB>
  static void store_rows(const Register (&sums)[NB], float* to, int64_t ld) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) store_one<LC>(sums[b], to + b * ld);
  }

 private:
  template <int LC>
  static void store_one(Register sum, float* to) {
    if (LC == 1) {
      _mm256_storeu_ps(to, sum.low);
      _mm256_storeu_ps(to + 8, sum.high);
      return;
    }
    if (LC == 16) {
      to[0] = across(_mm256_add_ps(sum.low, sum.high));
      return;
    }
    if (LC == 8) {
      to[0] = across(sum.low);
      to[1] = across(sum.high);
      return;
    }
    // neighbouring pairs, rows in 128-bit lanes as [low 0, low 1, high 0, high 1]
    const __m256 pairs = _mm256_hadd_ps(sum.low, sum.high);
    if (LC == 2) {
      const __m256d rows = _mm256_castps_pd(pairs);
      return _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_permute4x64_pd(rows, 0xd8)));
    }
    const __m256 rows = _mm256_hadd_ps(pairs, pairs);  // rows 0, 2 | 1, 3
    _mm_storeu_ps(to, _mm_unpacklo_ps(_mm256_castps256_ps128(rows), _mm256_extractf128_ps(rows, 1)));
  }

  template <int Dtype>
  static __m256 load_half(const uint8_t* from) {
    if (Dtype == SPARSECOMP_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (Dtype == SPARSECOMP_F16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }

  template <int LC>
  static __m256 spread_half(const float* from) {
    if (LC == 1) return _mm256_broadcast_ss(from);
    if (LC == 2) {
      double pair;
      std::memcpy(&pair, from, 8);
      return _mm256_castpd_ps(_mm256_set1_pd(pair));
    }
    if (LC == 4) {
      const __m128 four = _mm_loadu_ps(from);
      return _mm256_set_m128(four, four);
    }
    return _mm256_loadu_ps(from);
  }

  static float across(__m256 sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace

constexpr BlockKernels kBlockAvx2 = make_block_kernels<Avx2Lanes, 1, 2, 4, 6>();

}  // namespace sparsecomp
