// Panels of 8-lane vectors: 2 rows by 6 vectors are 12 of the 16 registers, the weights and a temporary the rest.
#include <immintrin.h>

#include "nm/kernel_list.hpp"
#include "nm/panel_kernel.hpp"
#include "nm/x86/panel_sets.hpp"

namespace sparsecomp {
namespace {

// to[j][i] = from[i][j] for 8 by 8 elements of 4 bytes.
void transpose_8x8(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 a[8], b[8];
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * ld_from);
  // pairs of elements, then of pairs: every 128-bit lane is a transposed 4 by 4 block
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; i += 4) {
    SPARSECOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m256d low = _mm256_castps_pd(b[i + half]), high = _mm256_castps_pd(b[i + half + 2]);
      a[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  SPARSECOMP_UNROLL
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * ld_to, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * ld_to, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

struct Avx2 {
  using Register = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kOneRegister = false;
  static Register zero() { return _mm256_setzero_ps(); }
  static Register load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Register v) { _mm256_storeu_ps(to, v); }
  static Register broadcast(float v) { return _mm256_set1_ps(v); }
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    *sum = _mm256_fmadd_ps(a, b, *sum);
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) { add_product(a, load(b), sum); }
  static constexpr auto transpose = transpose_8x8;
};

// The sum in its place, as for Avx512Intel.
struct Avx2Intel : Avx2 {
  static constexpr bool kOneRegister = true;
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) {
#if defined(SPARSECOMP_SANITIZED)
    add_product(a, load(b), sum);
#else
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "m"(*reinterpret_cast<const __m256_u*>(b)));
#endif
  }
};

template <class Vector, int M, int N>
const PanelSet* alone() {
  static constexpr PanelSet set =
      make_panel_set<Vector, M, N, 2, 2, 6, false>(M == 16 ? 13 : 25, M == 16 ? 0 : 48, M == 16 ? 1.6 : 1.1);
  return &set;
}

template <class Vector, int M, int N>
const PanelSet* shared() {
  static constexpr PanelSet set = make_panel_set<Vector, M, N, 4, 1, 2, true>(13, M == 16 ? 0 : 48, 1.1);
  return &set;
}

template <class Vector>
const PanelSet* select_vector(const Geometry& g) {
  if (g.mask_rows % 4 == 0)
    return own_or_group_kernels<line_of("avx2", "shared panel"), PanelSet>(
        g, [](auto pattern) { return shared<Vector, pattern.kM, pattern.kN>(); });
  return own_or_group_kernels<line_of("avx2", "panel"), PanelSet>(
      g, [](auto pattern) { return alone<Vector, pattern.kM, pattern.kN>(); });
}

}  // namespace

const PanelSet* select_panels_avx2(const Geometry& g, const Processor& processor) {
  return processor.intel ? select_vector<Avx2Intel>(g) : select_vector<Avx2>(g);
}

}  // namespace sparsecomp
