// Block-sparse products on AVX-512: a register holds the 16 lanes of a vector of weights.
// 24 columns: 24 sums, the weights, an activation; 25 loads for 24 multiply-adds, of which two a cycle can run.
#include <immintrin.h>

#include "block/micro.hpp"

namespace sparsecomp {
namespace {

struct Avx512Lanes {
  using Register = __m512;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register multiply_add(Register a, Register b, Register sum) { return _mm512_fmadd_ps(a, b, sum); }

  template <int Dtype>
  static Register load(const uint8_t* from) {
    if (Dtype == SPARSECOMP_F32) return _mm512_loadu_ps(from);
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (Dtype == SPARSECOMP_F16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  template <int LC>
  static Register spread(const float* from) {
    if (LC == 1) return _mm512_set1_ps(*from);
    if (LC == 2) {
      double pair;
      std::memcpy(&pair, from, 8);
      return _mm512_castpd_ps(_mm512_set1_pd(pair));
    }
    if (LC == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    if (LC == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
    return _mm512_loadu_ps(from);
  }

  template <int LC, int NB>
  static void store_rows(const Register (&sums)[NB], float* to, int64_t ld) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; b += kTogether<LC, NB>) {
      if constexpr (LC == 1) {
        _mm512_storeu_ps(to + b * ld, sums[b]);
      } else if constexpr (kTogether<LC, NB> == 1) {
        store_one<LC>(sums[b], to + b * ld);
      } else if constexpr (LC == 2) {
        store_two(sums[b], sums[b + 1], to + b * ld, ld);
      } else {
        store_four<LC>(sums[b], sums[b + 1], sums[b + 2], sums[b + 3], to + b * ld, ld);
      }
    }
  }

 private:
  // Registers that are added across their lanes together: shuffles then serve all of them.
  template <int LC, int NB>
  static constexpr int kTogether = LC == 2 && NB % 2 == 0  ? 2
                                   : LC > 2 && NB % 4 == 0 ? 4
                                                           : 1;

  template <int LC>
  static void store_one(Register sum, float* to) {
    sum = add(sum, _mm512_permute_ps(sum, 0xb1));
    if (LC >= 4) sum = add(sum, _mm512_permute_ps(sum, 0x4e));
    if (LC >= 8) sum = add(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
    if (LC >= 16) sum = add(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
    constexpr int kEvery = LC == 2 ? 0x5555 : LC == 4 ? 0x1111 : LC == 8 ? 0x0101 : 0x0001;
    const __m512 rows = _mm512_maskz_compress_ps(static_cast<__mmask16>(kEvery), sum);
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1 << (kLanes / LC)) - 1), rows);
  }

  static void store_two(Register a, Register b, float* to, int64_t ld) {
    // in each 128-bit lane two rows of a, then the same two of b
    const __m512 rows = add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    const __m512d apart = _mm512_permutexvar_pd(order, _mm512_castps_pd(rows));
    _mm256_storeu_ps(to, _mm256_castpd_ps(_mm512_castpd512_pd256(apart)));
    _mm256_storeu_ps(to + ld, _mm256_castpd_ps(_mm512_extractf64x4_pd(apart, 1)));
  }

  template <int LC>
  static void store_four(Register a, Register b, Register c, Register d, float* to, int64_t ld) {
    const __m512 ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    // each 128-bit lane holds its sum of a, b, c and d
    __m512 quads = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    if (LC >= 8) quads = add(quads, _mm512_shuffle_f32x4(quads, quads, 0xb1));
    if (LC >= 16) quads = add(quads, _mm512_shuffle_f32x4(quads, quads, 0x4e));
    if constexpr (LC == 4) {
      const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
      const __m512 rows = _mm512_permutexvar_ps(order, quads);
      _mm_storeu_ps(to, _mm512_castps512_ps128(rows));
      _mm_storeu_ps(to + ld, _mm512_extractf32x4_ps(rows, 1));
      _mm_storeu_ps(to + 2 * ld, _mm512_extractf32x4_ps(rows, 2));
      _mm_storeu_ps(to + 3 * ld, _mm512_extractf32x4_ps(rows, 3));
    } else {
      alignas(16) float rows[2][4];
      _mm_store_ps(rows[0], _mm512_castps512_ps128(quads));
      if (LC == 8) _mm_store_ps(rows[1], _mm512_extractf32x4_ps(quads, 2));
      for (int i = 0; i < 4; ++i) {
        to[i * ld] = rows[0][i];
        if (LC == 8) to[i * ld + 1] = rows[1][i];
      }
    }
  }
};

}  // namespace

constexpr BlockKernels kBlockAvx512 = make_block_kernels<Avx512Lanes, 1, 2, 4, 8, 16, 24>();

}  // namespace sparsecomp
