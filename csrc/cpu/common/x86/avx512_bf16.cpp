// Probes on AVX-512 BF16; epilogue and widening are those of AVX-512.
#include <immintrin.h>

#include "common/isa.hpp"
#include "common/measure.hpp"
#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

constexpr int kLanes = 16;

double flops(int dtype, double seconds) {
  if (dtype != SPARSECOMP_BF16) return kAvx512.flops(dtype, seconds);
  constexpr int kChains = 16;
  const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
  return measure_rate(seconds, 4.0 * kLanes * kChains, [=](int64_t rounds) {
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

constexpr Isa kAvx512Bf16 = {widen, finish, flops, read_stream};

}  // namespace sparsecomp
