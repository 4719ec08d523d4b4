// 16 elements of fp16 or bf16 from and to fp32, rounded to nearest even, NaN kept. Included by files that are compiled
// for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "sparsecomp.h"

namespace sparsecomp {
namespace {

inline __m512 widen_vector(__m256i raw, int dtype) {
  return dtype == SPARSECOMP_F16 ? _mm512_cvtph_ps(raw)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline __m256i narrow_vector(__m512 value, int dtype) {
  if (dtype == SPARSECOMP_F16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

}  // namespace
}  // namespace sparsecomp
