// fp32 products on AVX2 + FMA + F16C, from the same layout: a tile is two halves of 8 rows, a step two halves of 8
// columns. A group of 8 columns is one half of the step, so one permute finds an activation; a group of 16 takes a
// permute of both halves and a blend; smaller groups are served by permute_avx2_near.cpp. Narrower weights are widened
// in registers; x arrives widened.
#include <immintrin.h>

#include "common/unroll.hpp"
#include "nm/kernel_list.hpp"
#include "nm/kernels.hpp"
#include "nm/permute.hpp"
#include "nm/x86/panel_sets.hpp"
#include "nm/x86/permute_avx2.hpp"
#include "nm/x86/permute_avx2_near.hpp"
#include "nm/x86/prefetch.hpp"

namespace sparsecomp {
namespace {

// One tile by NB columns. Registers for NB = 4: 8 sums, 2 values, 2 index words, 2 indices, a permuted activation; the
// activations are memory operands of the permutes.
template <class Values, int M, int N, int NB>
void micro(const PermuteArgs& args) {
  using Step = StepGeometry<M, N>;
  constexpr int kBits = Step::kBits, kWordSlots = Step::kWordSlots;
  static_assert(Step::kSlots <= kWordSlots, "kernels of their own read the positions of a step from one index word");
  constexpr int kChains = NB <= 2 ? 2 : 1;
  const Geometry& g = *args.geometry;
  const uint8_t* values = args.values;
  const uint8_t* metadata = args.metadata;
  const auto* x = static_cast<const float*>(args.x);
  int bases[kStep];
  for (int slot = 0; slot < kStep; ++slot) bases[slot] = slot / g.n * M;

  Prefetcher prefetch(args, g.value_bytes, g.metadata_bytes);

  __m256 sums[kHalves][NB][kChains];
  SPARSECOMP_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      sums[half][b][0] = args.add ? _mm256_loadu_ps(args.sums + b * kTile + half * kLanes) : _mm256_setzero_ps();
      if (kChains == 2) sums[half][b][kChains - 1] = _mm256_setzero_ps();
    }
  }

  for (int64_t step = 0; step < args.steps; ++step) {
    if (args.stream) {
      prefetch.tile<0>(0);
      prefetch.advance();
    }
    __m256i index[kHalves];
    const auto load_words = [&](int word) {
      SPARSECOMP_UNROLL
      for (int half = 0; half < kHalves; ++half)
        index[half] = load_index_word(metadata, word, half, g.full_words, g.rest_bytes);
    };
    const auto multiply = [&](int slot, int base, int chain) {
      SPARSECOMP_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const __m256 value = Values::load(values, slot, half);
        const __m256i column = index[half];  // of which the permute reads the low three bits only
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index[half], 28));  // bit 3 as the sign
        SPARSECOMP_UNROLL
        for (int b = 0; b < NB; ++b) {
          const float* from = x + b * args.ldx;
          __m256 activation;
          if (M == 16) {
            activation = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), column),
                                          _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + kLanes), column), upper);
          } else {
            activation = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + base), column);
          }
          sums[half][b][chain] = _mm256_fmadd_ps(value, activation, sums[half][b][chain]);
        }
        index[half] = _mm256_srli_epi32(index[half], kBits);
      }
    };
    if constexpr (N != 0) {
      load_words(0);
      SPARSECOMP_UNROLL
      for (int slot = 0; slot < Step::kSlots; ++slot) multiply(slot, slot / N * M, slot % kChains);
    } else {
      for (int word = 0, slot = 0; word < g.words; ++word) {
        load_words(word);
        const int end = g.slots < slot + kWordSlots ? g.slots : slot + kWordSlots;
        for (; slot + 1 < end; slot += 2) {
          multiply(slot, bases[slot], 0);
          multiply(slot + 1, bases[slot + 1], kChains - 1);
        }
        if (slot < end) {
          multiply(slot, bases[slot], 0);
          ++slot;
        }
      }
    }
    values += g.value_bytes;
    metadata += g.metadata_bytes;
    x += kStep;
  }

  SPARSECOMP_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      __m256 sum = sums[half][b][0];
      if (kChains == 2) sum = _mm256_add_ps(sum, sums[half][b][kChains - 1]);
      _mm256_storeu_ps(args.sums + b * kTile + half * kLanes, sum);
    }
  }
}

template <class Values, int M, int N>
constexpr PermuteSet make_set() {
  PermuteSet set{SPARSECOMP_F32, 1, {}, 1, -1};
  set.micro[1][1] = micro<Values, M, N, 1>;
  set.micro[1][2] = micro<Values, M, N, 2>;
  set.micro[1][3] = micro<Values, M, N, 3>;
  set.micro[1][4] = micro<Values, M, N, 4>;
  return set;
}

template <class Values, int M, int N>
constexpr PermuteSet kSet = make_set<Values, M, N>();

template <int M, int N>
constexpr PermuteSet kSet<ValuesF16, M, N> = with_floats(make_set<ValuesF16, M, N>(), &kSet<ValuesF32, M, N>);

template <class Values>
const PermuteSet* select_for(const Geometry& g) {
  return own_or_group_kernels<line_of("avx2", "permute"), PermuteSet>(g, [](auto pattern) {
    constexpr int kM = decltype(pattern)::kM, kN = decltype(pattern)::kN;
    if constexpr (kM >= kLanes)
      return &kSet<Values, kM, kN>;
    else
      return static_cast<const PermuteSet*>(nullptr);
  });
}

const PermuteSet* select(const Geometry& g, const Processor&) {
  if (g.m < kLanes) return select_permute_avx2_near(g);
  switch (g.dtype) {
    case SPARSECOMP_F32:
      return select_for<ValuesF32>(g);
    case SPARSECOMP_F16:
      return select_for<ValuesF16>(g);
    case SPARSECOMP_I8:
      return select_for<ValuesI8>(g);
    default:
      return select_for<ValuesBf16>(g);
  }
}

}  // namespace

constexpr NmKernels kNmAvx2 = {select, select_panels_avx2};

}  // namespace sparsecomp
