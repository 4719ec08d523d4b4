// Int8 products on AVX-512 VNNI. A register is one word of the 16 rows of a tile. A byte shuffle within 128-bit lanes,
// all of which hold the 16 activations of the step, finds what every weight meets; one multiply-add follows.
#include <immintrin.h>

#include "common/measure.hpp"
#include "common/unroll.hpp"
#include "int8/linear.hpp"
#include "int8/stream.hpp"

namespace sparsecomp::int8 {
namespace {

constexpr int kWordBytes = kTile * kWordWeights;
constexpr int kLanes128 = 4;
// Copies pay from so many batch columns on, of rows that are short enough to stay near with them.
constexpr int64_t kCopiedBatch = 16, kCopiedColumns = 8192;
constexpr int64_t kCopiedSmallBatch = 4, kCopiedFewColumns = 512;

// The columns of word `word` of a round.
inline __m512i word_columns(const uint8_t* metadata, int word) {
  const __m512i pair = _mm512_loadu_si512(metadata + word / 2 * kWordBytes);
  return _mm512_and_si512(word % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
}

// y, or sums, of the sums of tile `t` of `tiles`.
template <int NB>
inline void end_tile(const MicroArgs& args, int tiles, int t, const __m512i (&totals)[NB]) {
  const __m512i row_sums = _mm512_loadu_si512(args.row_sums + t * kTile);
  __m512 sums[NB];
  SPARSECOMP_UNROLL
  for (int b = 0; b < NB; ++b) {
    const __m512i offset = _mm512_mullo_epi32(row_sums, _mm512_set1_epi32(args.rows[b].zero_point));
    sums[b] =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(totals[b], offset)), _mm512_set1_ps(args.rows[b].scale));
  }
  if (args.y) {
    const __m512 scale = args.scales ? _mm512_loadu_ps(args.scales + t * kTile) : _mm512_set1_ps(1.0f);
    const __m512 bias = args.bias ? _mm512_loadu_ps(args.bias + t * kTile) : _mm512_setzero_ps();
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b)
      _mm512_storeu_ps(args.y + b * args.ldy + t * kTile, _mm512_fmadd_ps(sums[b], scale, bias));
  } else {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) _mm512_storeu_ps(args.sums + (b * tiles + t) * kTile, sums[b]);
  }
}

// The activations of a step in all lanes of 128 bits.
template <int Copies>
inline __m512i lanes_of(const uint8_t* from) {
  if (Copies == kLanes128) return _mm512_loadu_si512(from);
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// T tiles by NB batch columns of weights with W words a step; all 16 columns where kDense. The sums of few columns are
// held in several registers each, or the latency of the multiply-adds shows.
//
// Copies of the 16 activations of a step: what copies them to the lanes of a register as it reads them takes the place
// of a shuffle. Rounding makes four copies where a batch is large and few words of weights share a read would be slower
// than reading four times as much.
template <int W, bool kDense, int Copies, int T, int NB>
void micro(const MicroArgs& args) {
  constexpr int kSteps = W % 2 ? 2 : 1, kRoundWords = kSteps * W;
  constexpr int kValueBytes = kRoundWords * kWordBytes, kMetadataBytes = kDense ? 0 : kValueBytes / 2;
  constexpr int kChains = T * NB <= 4 ? kRoundWords : 1;
  const int64_t value_stride = args.value_stride, metadata_stride = args.metadata_stride, ldx = args.ldx;
  const uint8_t *values = args.values, *metadata = args.metadata, *x = args.x;
  Stream stream(args, kValueBytes, kMetadataBytes);

  __m512i sums[T][NB][kChains];
  SPARSECOMP_UNROLL
  for (int t = 0; t < T; ++t) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      SPARSECOMP_UNROLL
      for (int c = 0; c < kChains; ++c) sums[t][b][c] = _mm512_setzero_si512();
      if (args.add) sums[t][b][0] = _mm512_loadu_si512(args.partial + (b * T + t) * kTile);
    }
  }

  for (int64_t round = 0; round < args.rounds; ++round) {
    if (args.stream) stream.template next<T, kValueBytes, kMetadataBytes>();
    SPARSECOMP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      __m512i weights[T][W], columns[T][W];
      SPARSECOMP_UNROLL
      for (int t = 0; t < T; ++t) {
        SPARSECOMP_UNROLL
        for (int w = 0; w < W; ++w) {
          const int word = step * W + w;
          weights[t][w] = _mm512_loadu_si512(values + t * value_stride + word * kWordBytes);
          if (!kDense) columns[t][w] = word_columns(metadata + t * metadata_stride, word);
        }
      }
      SPARSECOMP_UNROLL
      for (int b = 0; b < NB; ++b) {
        const uint8_t* from = x + b * ldx + step * kStep * Copies;
        const __m512i all = lanes_of<Copies>(from);
        SPARSECOMP_UNROLL
        for (int w = 0; w < W; ++w) {
          const __m512i word = kDense ? _mm512_set1_epi32(reinterpret_cast<const int*>(from)[w]) : all;
          SPARSECOMP_UNROLL
          for (int t = 0; t < T; ++t) {
            const int c = (step * W + w) % kChains;
            sums[t][b][c] = _mm512_dpbusd_epi32(sums[t][b][c], kDense ? word : _mm512_shuffle_epi8(all, columns[t][w]),
                                                weights[t][w]);
          }
        }
      }
    }
    values += kValueBytes;
    metadata += kMetadataBytes;
    x += kSteps * kStep * Copies;
    SPARSECOMP_UNROLL
    for (int t = 0; t < T; ++t) {
      SPARSECOMP_UNROLL
      for (int b = 0; b < NB; ++b) {
        SPARSECOMP_UNROLL
        for (int c = 0; c < kChains; ++c) __asm__("" : "+v"(sums[t][b][c]));  // in registers: GCC would store copies
      }
    }
  }

  SPARSECOMP_UNROLL
  for (int t = 0; t < T; ++t) {
    __m512i totals[NB];
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      totals[b] = sums[t][b][0];
      SPARSECOMP_UNROLL
      for (int c = 1; c < kChains; ++c) totals[b] = _mm512_add_epi32(totals[b], sums[t][b][c]);
    }
    if (args.done) {
      end_tile(args, T, t, totals);
    } else {
      SPARSECOMP_UNROLL
      for (int b = 0; b < NB; ++b) _mm512_storeu_si512(args.partial + (b * T + t) * kTile, totals[b]);
    }
  }
}

template <int W, bool kDense, int Copies, int T>
constexpr void fill(Micro (&row)[kMostColumns + 1]) {
  row[1] = micro<W, kDense, Copies, T, 1>;
  row[2] = micro<W, kDense, Copies, T, 2>;
  row[3] = micro<W, kDense, Copies, T, 3>;
  row[4] = micro<W, kDense, Copies, T, 4>;
  row[5] = micro<W, kDense, Copies, T, 5>;
  row[6] = micro<W, kDense, Copies, T, 6>;
  row[7] = micro<W, kDense, Copies, T, 7>;
  row[8] = micro<W, kDense, Copies, T, 8>;
}

template <int W, bool kDense, int Copies>
constexpr MicroSet make_set() {
  MicroSet set{false, Copies, {}};
  fill<W, kDense, Copies, 1>(set.micro[1]);
  fill<W, kDense, Copies, 2>(set.micro[2]);
  return set;
}

template <int W, bool kDense, int Copies>
const MicroSet* set_of() {
  static constexpr MicroSet set = make_set<W, kDense, Copies>();
  return &set;
}

template <int Copies>
const MicroSet* sparse_set(int words) {
  return words == 2 ? set_of<2, false, Copies>() : words == 3 ? set_of<3, false, Copies>() : set_of<4, false, Copies>();
}

const MicroSet* select(const Geometry& g, int64_t batch) {
  if (g.dense) return set_of<4, true, 1>();
  if (g.words == 1) return set_of<1, false, 1>();
  const bool copied = g.columns <= kCopiedFewColumns ? batch >= kCopiedSmallBatch
                                                     : batch >= kCopiedBatch && g.columns <= kCopiedColumns;
  return copied ? sparse_set<kLanes128>(g.words) : sparse_set<1>(g.words);
}

constexpr int kLanes = 16;

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << count) - 1);
}

bool range(const float* x, int64_t count, float* smallest, float* largest) {
  constexpr int kChains = 4;
  __m512 low[kChains], high[kChains], finite[kChains];
  SPARSECOMP_UNROLL
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = finite[c] = _mm512_setzero_ps();
  const auto take = [&](int c, __m512 v) __attribute__((always_inline)) {
    low[c] = _mm512_min_ps(v, low[c]);
    high[c] = _mm512_max_ps(v, high[c]);
    finite[c] = _mm512_fmadd_ps(v, _mm512_setzero_ps(), finite[c]);  // NaN from the first Inf or NaN on
  };
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    SPARSECOMP_UNROLL
    for (int c = 0; c < kChains; ++c) take(c, _mm512_loadu_ps(x + i + c * kLanes));
  }
  for (; i < count; i += kLanes) take(0, _mm512_maskz_loadu_ps(first_lanes(count - i), x + i));
  SPARSECOMP_UNROLL
  for (int c = 1; c < kChains; ++c) {
    low[0] = _mm512_min_ps(low[0], low[c]);
    high[0] = _mm512_max_ps(high[0], high[c]);
    finite[0] = _mm512_add_ps(finite[0], finite[c]);
  }
  *smallest = _mm512_reduce_min_ps(low[0]);
  *largest = _mm512_reduce_max_ps(high[0]);
  return _mm512_cmp_ps_mask(finite[0], finite[0], _CMP_UNORD_Q) == 0;
}

void round(const float* x, int64_t count, float inverse, int zero_point, const MicroSet& set, uint8_t* to) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(zero_point)), least = _mm512_set1_epi8(-kLargest);
  const __m512i flip = _mm512_set1_epi8(set.signed_x ? 0 : -128);
  // the packs below go lane by lane
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < count; i += 4 * kLanes) {
    __m512i part[4];
    SPARSECOMP_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int64_t left = count - i - c * kLanes;
      const __m512 v = left >= kLanes ? _mm512_loadu_ps(x + i + c * kLanes)
                       : left > 0     ? _mm512_maskz_loadu_ps(first_lanes(left), x + i + c * kLanes)
                                      : _mm512_setzero_ps();
      part[c] = _mm512_cvtps_epi32(_mm512_mul_ps(v, factor));
    }
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(part[0], part[1]), zero);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(part[2], part[3]), zero);
    const __m512i bytes = _mm512_max_epi8(_mm512_packs_epi16(low, high), least);
    const __m512i sorted = _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), flip);
    if (set.copies == kLanes128) {
      uint8_t* steps = to + i * kLanes128;
      _mm512_storeu_si512(steps, _mm512_shuffle_i32x4(sorted, sorted, 0x00));
      _mm512_storeu_si512(steps + 64, _mm512_shuffle_i32x4(sorted, sorted, 0x55));
      _mm512_storeu_si512(steps + 128, _mm512_shuffle_i32x4(sorted, sorted, 0xaa));
      _mm512_storeu_si512(steps + 192, _mm512_shuffle_i32x4(sorted, sorted, 0xff));
    } else {
      _mm512_storeu_si512(to + i, sorted);
    }
  }
}

double operations(double seconds) {
  constexpr int kChains = 16;
  const __m512i factor = _mm512_set1_epi8(1);
  return measure_rate(seconds, 2.0 * kWordWeights * kLanes * kChains, [=](int64_t rounds) {
    __m512i sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = _mm512_dpbusd_epi32(sums[i], factor, factor);
        __asm__ volatile("" : "+v"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

}  // namespace

constexpr Kernels kAvx512Vnni = {select, range, round, operations};

}  // namespace sparsecomp::int8
