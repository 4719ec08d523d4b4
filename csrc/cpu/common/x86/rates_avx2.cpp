// The probes of rates.hpp: eight independent chains each, from lines that stay in the L1 cache. Rounds of microseconds
// take turns and the fastest of each counts, so a neighbour that is busy for a moment changes nothing.
#include <immintrin.h>

#include <cstdint>

#include "common/measure.hpp"
#include "common/rates.hpp"
#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

constexpr int kChains = 8;
constexpr int64_t kPasses = 1000;  // of a round over all chains
constexpr int kRounds = 40;
constexpr int kRowFloats = 16;  // a line for each chain

struct Operands {
  const float* x;
  int64_t offset;  // zero, which the compiler does not know
  __m256 weight;
  __m256i index;
};

using Chains = __m256[kChains];

// vpermilps
struct Near {
  SPARSECOMP_INLINE static void pass(const Operands& o, Chains& sums) {
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; i += 2) {
      __m256 group, first;
      __asm__ volatile("vbroadcastf128 %1, %0" : "=x"(group) : "m"(*(o.x + i * kRowFloats)));
      __asm__ volatile("vpermilps %2, %1, %0" : "=x"(first) : "x"(group), "x"(o.index));
      __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sums[i]) : "x"(first), "x"(o.weight));
      __asm__ volatile("vpermilps %1, %0, %0" : "+x"(group) : "x"(o.index));
      __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sums[i + 1]) : "x"(group), "x"(o.weight));
    }
  }
};

// vpermps
struct Far {
  SPARSECOMP_INLINE static void pass(const Operands& o, Chains& sums) {
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) {
      __m256 found;
      __asm__ volatile("vpermps %1, %2, %0" : "=x"(found) : "m"(*(o.x + i * kRowFloats)), "x"(o.index));
      __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sums[i]) : "x"(found), "x"(o.weight));
    }
  }
};

struct Wide {
  SPARSECOMP_INLINE static void pass(const Operands& o, Chains& sums) {
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) {
      __m256 low, high;
      __asm__ volatile("vpermps %1, %2, %0" : "=x"(low) : "m"(*(o.x + i * kRowFloats)), "x"(o.index));
      __asm__ volatile("vpermps %1, %2, %0" : "=x"(high) : "m"(*(o.x + i * kRowFloats + 8)), "x"(o.index));
      __asm__ volatile("vblendvps %2, %1, %0, %0" : "+x"(low) : "x"(high), "x"(o.weight));
      __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sums[i]) : "x"(low), "x"(o.weight));
    }
  }
};

struct Multiply {
  SPARSECOMP_INLINE static void pass(const Operands& o, Chains& sums) {
    static_assert(kChains == 8 && kRowFloats == 16, "what is written out");
    __asm__ volatile(
        "vfmadd231ps 0(%8), %9, %0\n"
        "vfmadd231ps 64(%8), %9, %1\n"
        "vfmadd231ps 128(%8), %9, %2\n"
        "vfmadd231ps 192(%8), %9, %3\n"
        "vfmadd231ps 256(%8), %9, %4\n"
        "vfmadd231ps 320(%8), %9, %5\n"
        "vfmadd231ps 384(%8), %9, %6\n"
        "vfmadd231ps 448(%8), %9, %7\n"
        : "+x"(sums[0]), "+x"(sums[1]), "+x"(sums[2]), "+x"(sums[3]), "+x"(sums[4]), "+x"(sums[5]), "+x"(sums[6]),
          "+x"(sums[7])
        : "r"(o.x), "x"(o.weight));
  }
};

struct Indexed {
  SPARSECOMP_INLINE static void pass(const Operands& o, Chains& sums) {
    static_assert(kChains == 8 && kRowFloats == 16, "what is written out");
    __asm__ volatile(
        "vfmadd231ps 0(%8,%9), %10, %0\n"
        "vfmadd231ps 64(%8,%9), %10, %1\n"
        "vfmadd231ps 128(%8,%9), %10, %2\n"
        "vfmadd231ps 192(%8,%9), %10, %3\n"
        "vfmadd231ps 256(%8,%9), %10, %4\n"
        "vfmadd231ps 320(%8,%9), %10, %5\n"
        "vfmadd231ps 384(%8,%9), %10, %6\n"
        "vfmadd231ps 448(%8,%9), %10, %7\n"
        : "+x"(sums[0]), "+x"(sums[1]), "+x"(sums[2]), "+x"(sums[3]), "+x"(sums[4]), "+x"(sums[5]), "+x"(sums[6]),
          "+x"(sums[7])
        : "r"(o.x), "r"(o.offset), "x"(o.weight));
  }
};

template <class Probe>
void raise(const Operands& operands, double* rate) {
  Chains sums;
  SPARSECOMP_UNROLL
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_setzero_ps();
  const double start = clock_seconds();
  for (int64_t pass = 0; pass < kPasses; ++pass) Probe::pass(operands, sums);
  const double taken = clock_seconds() - start;
  const double found = taken > 0 ? static_cast<double>(kPasses * kChains) / taken * 1e-9 : 0;
  if (found > *rate) *rate = found;  // std::max would be a function that other files could be linked to
}

}  // namespace

void measure_rates_avx2(Rates* rates) {
  alignas(64) static const float kZeros[kChains * kRowFloats] = {};
  const Operands operands{kZeros, 0, _mm256_setzero_ps(), _mm256_set_epi32(0, 3, 2, 1, 3, 0, 1, 2)};
  *rates = {0, 0, 0, 0, 0};
  for (int round = 0; round < kRounds; ++round) {
    raise<Near>(operands, &rates->near);
    raise<Far>(operands, &rates->far);
    raise<Wide>(operands, &rates->wide);
    raise<Multiply>(operands, &rates->multiply);
    raise<Indexed>(operands, &rates->indexed);
  }
}

}  // namespace sparsecomp
