// What the panel kernels want to know of 16-lane registers. Included by files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

// rows[j][i] = rows[i][j] for 16 by 16 elements of 4 bytes.
SPARSECOMP_INLINE void transpose_rows(__m512 (&rows)[16]) {
  __m512 other[16];
  // pairs of elements, then of pairs: every 128-bit lane is a transposed 4 by 4 block
  SPARSECOMP_UNROLL
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  SPARSECOMP_UNROLL
  for (int i = 0; i < 16; i += 4) {
    SPARSECOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(other[i + half]), high = _mm512_castps_pd(other[i + half + 2]);
      rows[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // the 4 by 4 blocks
  SPARSECOMP_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0x88),
                 odd01 = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0x88),
                 odd23 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

// to[j][i] = from[i][j]
inline void transpose_16x16(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m512 rows[16];
  SPARSECOMP_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(from + i * ld_from);
  transpose_rows(rows);
  SPARSECOMP_UNROLL
  for (int j = 0; j < 16; ++j) _mm512_storeu_ps(to + j * ld_to, rows[j]);
}

struct Avx512 {
  using Register = __m512;
  static constexpr int kLanes = 16;
  static constexpr bool kOneRegister = false;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Register v) { _mm512_storeu_ps(to, v); }
  static Register broadcast(float v) { return _mm512_set1_ps(v); }
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    *sum = _mm512_fmadd_ps(a, b, *sum);
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) { add_product(a, load(b), sum); }
  static constexpr auto transpose = transpose_16x16;
};

// The sum in its place: GCC puts it anywhere and adds moves, which the front of an Intel pipeline has no room for.
struct Avx512Intel : Avx512 {
  static constexpr bool kOneRegister = true;
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) {
#if defined(SPARSECOMP_SANITIZED)  // sanitizers do not look into assembly
    add_product(a, load(b), sum);
#else
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "m"(*reinterpret_cast<const __m512_u*>(b)));
#endif
  }
};

}  // namespace
}  // namespace sparsecomp
