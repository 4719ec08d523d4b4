// The loops of the probes of peak rates. Included by every instruction set, so that each compiles them its own way.
#pragma once

#include <cstdint>

#include "common/unroll.hpp"

namespace sparsecomp {

// Seconds on a steady clock. Not inline, as templates of the standard library compiled for one instruction set could be
// linked into code for all.
double clock_seconds();

namespace {

// Operations per second of `loop(rounds)`, one round being `operations`, repeated for about `seconds`.
template <class Loop>
double measure_rate(double seconds, double operations, const Loop& loop) {
  constexpr int64_t kRounds = 10000;  // between two looks at the clock
  int64_t rounds = 0;
  double elapsed = 0;
  const double start = clock_seconds();
  do {
    loop(kRounds);
    rounds += kRounds;
    elapsed = clock_seconds() - start;
  } while (elapsed < seconds);
  return static_cast<double>(rounds) * operations / elapsed;
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Vector = uint64_t __attribute__((vector_size(kVectorBytes)));

// Two streams with prefetch, as the kernels read; one alone, or without, gets less out of the memory.
inline uint64_t read_stream(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  constexpr int64_t kBlock = 256;  // of one stream before the other's turn
  constexpr int kVectors = kBlock / kVectorBytes;
  const int64_t half = bytes / 2 / kBlock * kBlock;
  Vector sums[4] = {};
  for (int64_t i = 0; i < half; i += kBlock) {
    const uint8_t* const blocks[] = {data + i, data + half + i};
    for (const uint8_t* block : blocks) {
      for (int64_t line = 0; line < kBlock; line += 64) __builtin_prefetch(block + kAhead + line);
      SPARSECOMP_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[v % 4] ^= *reinterpret_cast<const Vector*>(block + v * kVectorBytes);
    }
  }
  const Vector all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  uint64_t sum = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) sum ^= all[i];
  return sum;
}

}  // namespace
}  // namespace sparsecomp
