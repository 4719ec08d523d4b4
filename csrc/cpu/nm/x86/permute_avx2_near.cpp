// Groups of 2 and 4 columns on AVX2. A load repeats the group in all of a register, so the permute need not leave 128
// bits, which some processors do at twice the rate; and it reads just the two low bits of its index, so positions are
// shifted into place and neither masked nor moved to their group. A group of 2 is repeated by pairs: bit 1 says
// nothing. Bound: pairs of such a permute and a multiply-add, as long as a load serves two of them.
#include <immintrin.h>

#include <cstring>

#include "common/unroll.hpp"
#include "nm/kernel_list.hpp"
#include "nm/permute.hpp"
#include "nm/x86/permute_avx2.hpp"
#include "nm/x86/permute_avx2_near.hpp"
#include "nm/x86/prefetch.hpp"

namespace sparsecomp {
namespace {

// The M activations from `from` on, over and over.
template <int M>
SPARSECOMP_INLINE __m256 repeat(const float* from) {
  if constexpr (M == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
  int64_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return _mm256_castsi256_ps(_mm256_set1_epi64x(pair));
}

// What was loaded before is loaded again: GCC would keep the groups of all columns, and spill sums.
SPARSECOMP_INLINE void forget_loads() { __asm__ volatile("" ::: "memory"); }

// One tile by NB columns. Registers for NB = 5 (fp32): 10 sums, 2 values, 2 index words, the group and a permuted
// activation. Few columns have several sums each, to hide the latency of the multiply-add.
template <class Values, int M, int N, int NB>
void micro(const PermuteArgs& args) {
  using Step = StepGeometry<M, N>;
  static_assert(M <= 4 && Step::kSlots <= Step::kWordSlots && Step::kSlots % 2 == 0,
                "pairs of slots of one index word");
  constexpr int kChains = NB == 1 ? 4 : NB == 2 ? 2 : 1;
  constexpr int kValueBytes = Values::bytes(Step::kSlots);
  const int64_t steps = args.steps, ldx = args.ldx;
  const bool stream = args.stream;
  const uint8_t* values = args.values;
  const uint8_t* metadata = args.metadata;
  const auto* x = static_cast<const float*>(args.x);
  Prefetcher prefetch(args, kValueBytes, Step::kMetadataBytes);

  __m256 sums[kHalves][NB][kChains];
  SPARSECOMP_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      sums[half][b][0] = args.add ? _mm256_loadu_ps(args.sums + b * kTile + half * kLanes) : _mm256_setzero_ps();
      SPARSECOMP_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sums[half][b][chain] = _mm256_setzero_ps();
    }
  }

  for (int64_t step = 0; step < steps; ++step) {
    if (stream) {
      prefetch.tile<kValueBytes>(0);
      prefetch.advance();
    }
    __m256i index[kHalves];
    SPARSECOMP_UNROLL
    for (int half = 0; half < kHalves; ++half)
      index[half] = load_index_word(metadata, 0, half, Step::kFullWords, Step::kRestBytes);
    SPARSECOMP_UNROLL
    for (int slot = 0; slot < Step::kSlots; ++slot) {
      __m256 weights[kHalves];
      SPARSECOMP_UNROLL
      for (int half = 0; half < kHalves; ++half) weights[half] = Values::load(values, slot, half);
      SPARSECOMP_UNROLL
      for (int b = 0; b < NB; ++b) {
        const __m256 group = repeat<M>(x + b * ldx + slot / N * M);
        SPARSECOMP_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          __m256& sum = sums[half][b][slot % kChains];
          sum = _mm256_fmadd_ps(weights[half], _mm256_permutevar_ps(group, index[half]), sum);
        }
      }
      SPARSECOMP_UNROLL
      for (int half = 0; half < kHalves; ++half) index[half] = _mm256_srli_epi32(index[half], Step::kBits);
      if constexpr (NB >= 3) forget_loads();
    }
    values += kValueBytes;
    metadata += Step::kMetadataBytes;
    x += kStep;
  }

  SPARSECOMP_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      __m256 sum = sums[half][b][0];
      SPARSECOMP_UNROLL
      for (int chain = 1; chain < kChains; ++chain) sum = _mm256_add_ps(sum, sums[half][b][chain]);
      _mm256_storeu_ps(args.sums + b * kTile + half * kLanes, sum);
    }
  }
}

template <class Values, int M, int N, int NB>
constexpr void fill_columns(PermuteSet* set) {
  set->micro[1][NB] = micro<Values, M, N, NB>;
  if constexpr (NB > 1) fill_columns<Values, M, N, NB - 1>(set);
}

template <class Values, int M, int N, int Most>
constexpr PermuteSet make_set() {
  PermuteSet set{SPARSECOMP_F32, 1, {}, 1, -1};
  fill_columns<Values, M, N, Most>(&set);
  return set;
}

template <class Values, int M, int N>
constexpr PermuteSet kSet = make_set<Values, M, N, 4>();

template <int M, int N>
constexpr PermuteSet kSet<ValuesF32, M, N> = make_set<ValuesF32, M, N, 5>();

template <int M, int N>
constexpr PermuteSet kSet<ValuesF16, M, N> = with_floats(make_set<ValuesF16, M, N, 4>(), &kSet<ValuesF32, M, N>);

template <int M, int N>
const PermuteSet* set_of(int dtype) {
  switch (dtype) {
    case SPARSECOMP_F32:
      return &kSet<ValuesF32, M, N>;
    case SPARSECOMP_F16:
      return &kSet<ValuesF16, M, N>;
    case SPARSECOMP_I8:
      return &kSet<ValuesI8, M, N>;
    default:
      return &kSet<ValuesBf16, M, N>;
  }
}

}  // namespace

const PermuteSet* select_permute_avx2_near(const Geometry& g) {
  return own_kernels<line_of("avx2", "permute"), PermuteSet>(g, [&](auto pattern) {
    constexpr int kM = decltype(pattern)::kM, kN = decltype(pattern)::kN;
    if constexpr (kM <= 4)
      return set_of<kM, kN>(g.dtype);
    else
      return static_cast<const PermuteSet*>(nullptr);
  });
}

}  // namespace sparsecomp
