// bf16 products with the AVX-512 BF16 dot product: a 32-bit lane holds two kept weights of a row, a word permute brings
// the two activations beside each other, one instruction multiplies and adds both in fp32. Other types as in
// avx512.cpp.
#include <cstring>

#include "../dispatch.hpp"
#include "../measure.hpp"
#include "avx512_common.hpp"
#include "convert_avx512.hpp"
#include "panel_sets.hpp"

namespace sparsecomp {
namespace {

struct Bf16Y {
  static constexpr int kDtype = SPARSECOMP_BF16;
  static __m512 load(const void* from, int64_t index) {
    return widen_vector(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + index)), kDtype);
  }
  static void store(__m512 value, void* to, int64_t index) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + index), narrow_vector(value, kDtype));
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

  template <int M, int N>
  static constexpr const DecodedSet* decoded();
  template <int M, int N>
  static constexpr const WideSet* wide();

  template <int M>
  static constexpr bool kReadsBases = M < 8;

  // Two positions of 2:4 are one of 16 values, to be looked up: less to do, but another permute, which is what eight
  // columns wait for (6% at 8 columns, the lookup is as much faster at 4).
  template <class Shape, int NB>
  static constexpr bool kTable = Shape::kSlots == 8 && Shape::kBits == 2 && NB < kMostColumns;

  // Positions of at most 16 bits lie in both halves of a lane, each half beginning with its own.
  template <class Shape, int NB>
  static constexpr bool kHalves = Shape::kStatic && Shape::kSlots * Shape::kBits <= 16 && !kTable<Shape, NB>;

  // Loops of unknown length gain nothing from 32 at once.
  template <class Shape>
  static constexpr int kSpan = !Shape::kStatic || (Shape::kBits == 4 && Shape::kSlots > 4) ? 1 : kMostSpan;

  template <class Shape, int NB>
  static __m512i first(__m512i word) {
    return kHalves<Shape, NB> ? in_halves<Shape>(word) : word;
  }
  template <class Shape, int NB>
  static __m512i next(__m512i word) {
    return kHalves<Shape, NB> ? _mm512_srli_epi16(word, 2 * Shape::kBits) : _mm512_srli_epi32(word, 2 * Shape::kBits);
  }

  // For an odd number of slots the second weight of the last pair is stored as zero, and its activation must be zero
  // too: it belongs to no slot of the row, and zero times Inf is NaN.
  template <int M, class Shape, int NB, int C>
  static inline void pair(const uint8_t* block, int slot, bool odd, __m512i word, const Base* bases, int chain,
                          const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    const auto value = reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + slot / 2 * kTile * 4));
    const __m512i index = columns<M, Shape, NB, kSpan<Shape>>(word, bases + slot);
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      const __m512i activations =
          odd ? _mm512_permutexvar_epi16(index, xs[b]) : _mm512_maskz_permutexvar_epi16(0x55555555, index, xs[b]);
      sums[b][chain] = _mm512_dpbf16_ps(sums[b][chain], value, reinterpret_cast<__m512bh>(activations));
    }
  }

  // Word indices of two slots, the first in the low half, the second in the high one.
  template <int M, class Shape, int NB, int Span>
  static __m512i columns(__m512i word, const Base* bases) {
    int32_t base;
    std::memcpy(&base, bases, sizeof(base));
    if (kTable<Shape, NB>) {  // a permute of 16 lanes reads the low four bits only
      const __m512i pairs = _mm512_setr_epi32(0x00000, 0x00001, 0x00002, 0x00003, 0x10000, 0x10001, 0x10002, 0x10003,
                                              0x20000, 0x20001, 0x20002, 0x20003, 0x30000, 0x30001, 0x30002, 0x30003);
      return _mm512_or_si512(_mm512_permutexvar_epi32(word, pairs), _mm512_set1_epi32(base));
    }
    const __m512i both = kHalves<Shape, NB> ? word : in_halves<Shape>(word);
    if (M == 16 && Span == 1) return both;
    // (both & mask) | base
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi32((M - 1) * 0x10001), _mm512_set1_epi32(base), 0xea);
  }

 private:
  template <class Shape>
  static __m512i in_halves(__m512i word) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, word, _mm512_slli_epi32(word, 16 - Shape::kBits));
  }
};

template <int M, int N>
void decode(const Geometry& g, const uint8_t* metadata, int64_t steps, uint8_t* indices) {
  using Shape = StepShape<M, N, DotProduct::Base>;
  constexpr bool kStatic = Shape::kStatic;
  constexpr Shape known(N == 0 ? 1 : N);
  const Shape shape = N == 0 ? Shape(g.n) : known;
  const int slots = kStatic ? shape.kSlots : g.slots, words = kStatic ? 1 : g.words;
  const int full_words = kStatic ? shape.kFullWords : g.full_words;
  const int rest_bytes = kStatic ? shape.kRestBytes : g.rest_bytes;
  for (int64_t step = 0; step < steps; ++step, metadata += g.metadata_bytes) {
    for (int word = 0, slot = 0; word < words; ++word) {
      __m512i positions =
          DotProduct::first<Shape, kMostColumns>(load_index_word(metadata, word, full_words, rest_bytes));
      const int end = slots < slot + shape.kWordSlots ? slots : slot + shape.kWordSlots;
      SPARSECOMP_UNROLL
      for (; slot < end; slot += 2, indices += kTile * 4) {
        _mm512_storeu_si512(
            indices, DotProduct::columns<M, Shape, kMostColumns, kMostSpan>(positions, shape.bases[step % 2] + slot));
        positions = DotProduct::next<Shape, kMostColumns>(positions);
      }
    }
  }
}

// T tiles by NB batch columns, as micro() but for the indices. kPairs: of a step, or 0 if that is not known.
template <int kPairs, int T, int NB>
void decoded_micro(const MicroArgs& args) {
  const Geometry& g = *args.geometry;
  const uint8_t *values = args.values, *indices = args.indices;
  const auto* x = static_cast<const DotProduct::X*>(args.x);
  Prefetcher prefetch(args);
  __m512 sums[T][NB][1];
  SPARSECOMP_UNROLL
  for (int t = 0; t < T; ++t) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b)
      sums[t][b][0] = args.add ? _mm512_loadu_ps(args.sums + (b * T + t) * kTile) : _mm512_setzero_ps();
  }
  const auto multiply_steps = [&](int count) __attribute__((always_inline)) {
    __m512i xs[NB];
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) xs[b] = _mm512_loadu_si512(x + b * args.ldx);
    for (int i = 0; i < count; ++i) {
      if (args.stream) {
        SPARSECOMP_UNROLL
        for (int t = 0; t < T; ++t) prefetch.template tile<0>(t);
        prefetch.advance();
      }
      const auto multiply = [&](int pair) __attribute__((always_inline)) {
        SPARSECOMP_UNROLL
        for (int t = 0; t < T; ++t) {
          const auto value =
              reinterpret_cast<__m512bh>(_mm512_loadu_si512(values + t * args.value_stride + pair * kTile * 4));
          const __m512i index = _mm512_loadu_si512(indices + t * args.index_stride + pair * kTile * 4);
          SPARSECOMP_UNROLL
          for (int b = 0; b < NB; ++b)
            sums[t][b][0] = _mm512_dpbf16_ps(sums[t][b][0], value,
                                             reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, xs[b])));
        }
      };
      if constexpr (kPairs != 0) {
        SPARSECOMP_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) multiply(pair);
      } else {
        for (int pair = 0; pair < g.slots / 2; ++pair) multiply(pair);
      }
      values += g.value_bytes;
      indices += g.slots / 2 * kTile * 4;
    }
    x += kMostSpan * kStep;
  };
  for (int64_t step = 0; step + 1 < args.steps; step += 2) multiply_steps(2);
  if (args.steps % 2 != 0) multiply_steps(1);
  end_micro<DotProduct::Y>(args, sums);
}

template <int kPairs, int T, int NB>
constexpr void fill_decoded(Micro* row) {
  row[NB] = decoded_micro<kPairs, T, NB>;
  if constexpr (NB > 1) fill_decoded<kPairs, T, NB - 1>(row);
}

template <int M, int N>
constexpr DecodedSet make_decoded() {
  constexpr int kPairs = kStep / M * N / 2;
  DecodedSet set{decode<M, N>, {}};
  fill_decoded<kPairs, 1, kMostColumns>(set.micro[1]);
  fill_decoded<kPairs, 2, kMostColumns>(set.micro[2]);
  return set;
}

template <int M, int N>
constexpr DecodedSet kDecoded = make_decoded<M, N>();

template <int M, int N>
constexpr const DecodedSet* DotProduct::decoded() {
  // 8:16 needs no constants and no masks: decoding is free beside the permutes
  if constexpr (M == 16 && N == 8)
    return nullptr;
  else
    return &kDecoded<M, N>;
}

// One tile by NB columns. Registers hold 32 activations of a column, for two steps; kFromMemory: none are left for
// activations, and each permute reads its own from memory.
template <int M, int N, int NB, bool kFromMemory>
void wide_micro(const MicroArgs& args) {
  using Shape = StepShape<M, N, DotProduct::Base>;
  const Geometry& g = *args.geometry;
  constexpr Shape known(N == 0 ? 1 : N);
  const Shape shape = N == 0 ? Shape(g.n) : known;
  const int full_words = Shape::kStatic ? Shape::kFullWords : g.full_words;
  const int rest_bytes = Shape::kStatic ? Shape::kRestBytes : g.rest_bytes;
  constexpr int block_bytes = (Shape::kSlots * DotProduct::kWeightBytes * kTile + 63) / 64 * 64;
  const uint8_t *values = args.values, *metadata = args.metadata;
  const auto* x = static_cast<const DotProduct::X*>(args.x);
  Prefetcher prefetch(args);
  __m512 sums[1][NB][1];
  SPARSECOMP_UNROLL
  for (int b = 0; b < NB; ++b) sums[0][b][0] = args.add ? _mm512_loadu_ps(args.sums + b * kTile) : _mm512_setzero_ps();
  const auto multiply_step = [&](int half) __attribute__((always_inline)) {
    if (args.stream) {
      prefetch.template tile<Shape::kStatic ? block_bytes : 0>(0);
      prefetch.advance();
    }
    const auto load_word = [&](int word) {
      return DotProduct::first<Shape, NB>(load_index_word(metadata, word, full_words, rest_bytes));
    };
    const auto multiply = [&](int slot, bool odd, __m512i word) __attribute__((always_inline)) {
      const auto value = reinterpret_cast<__m512bh>(_mm512_loadu_si512(values + slot / 2 * kTile * 4));
      const __m512i index = DotProduct::columns<M, Shape, NB, kMostSpan>(word, shape.bases[half] + slot);
      // or GCC would load all activations once, and spill sums for them
      if (kFromMemory) __asm__("" : "+r"(x));
      SPARSECOMP_UNROLL
      for (int b = 0; b < NB; ++b) {
        const __m512i both = _mm512_loadu_si512(x + b * args.ldx);
        const __m512i activations =
            odd ? _mm512_permutexvar_epi16(index, both) : _mm512_maskz_permutexvar_epi16(0x55555555, index, both);
        sums[0][b][0] = _mm512_dpbf16_ps(sums[0][b][0], value, reinterpret_cast<__m512bh>(activations));
      }
    };
    if constexpr (Shape::kStatic) {
      __m512i word = load_word(0);
      SPARSECOMP_UNROLL
      for (int slot = 0; slot < Shape::kSlots; slot += 2, word = DotProduct::next<Shape, NB>(word))
        multiply(slot, slot + 1 < Shape::kSlots, word);
    } else {
      for (int i = 0, slot = 0; i < g.words; ++i) {
        __m512i word = load_word(i);
        const int end = g.slots < slot + Shape::kWordSlots ? g.slots : slot + Shape::kWordSlots;
        for (; slot + 1 < end; slot += 2, word = DotProduct::next<Shape, NB>(word)) multiply(slot, true, word);
        if (slot < end) multiply(slot++, false, word);
      }
    }
    values += g.value_bytes;
    metadata += g.metadata_bytes;
  };
  for (int64_t step = 0; step + 1 < args.steps; step += 2, x += kMostSpan * kStep) {
    multiply_step(0);
    multiply_step(1);
  }
  if (args.steps % 2 != 0) multiply_step(0);
  end_micro<DotProduct::Y>(args, sums);
}

template <int M, int N, int NB>
constexpr void fill_wide(Micro* row) {
  row[NB] = wide_micro<M, N, NB, false>;
  if constexpr (NB > kMostColumns + 1) fill_wide<M, N, NB - 1>(row);
}

// Of 16 columns only those whose positions take much decoding: to the others two kernels of eight are equal.
template <int M, int N>
constexpr WideSet make_wide() {
  WideSet set{};
  fill_wide<M, N, kMostWideColumns - 1>(set.micro);
  if constexpr (M < 16 && kStep / M * N == 8) set.micro[kMostWideColumns] = wide_micro<M, N, kMostWideColumns, true>;
  return set;
}

template <int M, int N>
constexpr WideSet kWide = make_wide<M, N>();

template <int M, int N>
constexpr const WideSet* DotProduct::wide() {
  return &kWide<M, N>;
}

const KernelSet* select(const Geometry& g) {
  return g.dtype == SPARSECOMP_BF16 ? select_for<DotProduct>(g) : kAvx512.select(g);
}

double flops(int dtype, double seconds) {
  if (dtype != SPARSECOMP_BF16) return kAvx512.flops(dtype, seconds);
  constexpr int kChains = 16;
  const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
  return measure_rate(seconds, 4.0 * kTile * kChains, [=](int64_t rounds) {
    __m512 sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
        __asm__ volatile("" : "+v"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

// What the two sets share is called through the table of the other: copying its pointers would be code that runs at
// load, compiled for AVX-512, also on machines that have none.
void widen(const void* from, int dtype, float* to, int64_t count) { kAvx512.widen(from, dtype, to, count); }
void finish(const FinishArgs& args) { kAvx512.finish(args); }

}  // namespace

constexpr Isa kAvx512Bf16 = {"avx512_bf16", select, select_panels_avx512_bf16, widen, finish, flops, read_stream};

}  // namespace sparsecomp
