// Measures what this machine can do at most: multiply-adds in registers, and reads from DRAM.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/measure.hpp"
#include "common/parallel.hpp"
#include "common/processor.hpp"
#include "dispatch.hpp"
#include "sparsecomp.h"

namespace {

constexpr int kRounds = 3;

// Independent chains of multiply-adds that the compiler turns into the baseline vector code of the build.
double baseline_flops(int, double seconds) {
  constexpr int kChains = 32;
  volatile float source = 0.999f;
  const float factor = source;
  return sparsecomp::measure_rate(seconds, 2.0 * kChains, [=](int64_t rounds) {
    float sums[kChains] = {};
    for (int64_t round = 0; round < rounds; ++round)
      for (float& sum : sums) sum = sum * factor + factor;
    volatile float sink = 0;
    for (float sum : sums) sink = sink + sum;
  });
}

using Probe = double (*)(int dtype, double seconds);

Probe probe_of(int dtype) {
  const sparsecomp::Dispatch& found = sparsecomp::dispatch();
  if (dtype == SPARSECOMP_I8_A8 && found.int8)
    return [](int, double seconds) { return sparsecomp::dispatch().int8->operations(seconds); };
  return found.isa ? found.isa->flops : baseline_flops;
}

// Four times the last-level cache, at least 64 MB and at most 1 GB.
int64_t bandwidth_bytes() {
  int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return std::clamp<int64_t>(cache * 4, int64_t{64} << 20, int64_t{1} << 30);
}

}  // namespace

double sparsecomp::clock_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

extern "C" {

double sparsecomp_measure_flops(int32_t dtype, int threads, double seconds) {
  threads = sparsecomp::resolve_threads(threads);
  const auto probe = probe_of(dtype);
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> rates(static_cast<size_t>(threads), 0.0);
    sparsecomp::parallel_for(threads, threads,
                             [&](int64_t i) { rates[static_cast<size_t>(i)] = probe(dtype, seconds); });
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

double sparsecomp_measure_read_bandwidth(int threads) {
  threads = sparsecomp::resolve_threads(threads);
  const int64_t bytes = bandwidth_bytes();
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(bytes)));
  if (!data) return 0;
  const int64_t part = bytes / threads / 4096 * 4096;
  const sparsecomp::Isa* isa = sparsecomp::dispatch().isa;
  const auto read = isa ? isa->read : sparsecomp::read_stream;
  std::atomic<uint64_t> sink{0};
  // each thread touches its own part first, so that the pages lie in its own node's memory
  sparsecomp::parallel_for(threads, threads,
                           [&](int64_t i) { std::memset(data + i * part, 1, static_cast<size_t>(part)); });
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double start = sparsecomp::clock_seconds();
    sparsecomp::parallel_for(threads, threads, [&](int64_t i) { sink ^= read(data + i * part, part); });
    best = std::max(best, static_cast<double>(part * threads) / (sparsecomp::clock_seconds() - start));
  }
  std::free(data);
  return best;
}

double sparsecomp_pair_rate(int32_t columns) {
  const sparsecomp::Isa* isa = sparsecomp::dispatch().isa;
  if (!isa || !isa->rates) return 0;
  const sparsecomp::Rates& rates = sparsecomp::processor(*isa).rates;
  constexpr double kNano = 1e9;
  switch (columns) {
    case 1:
      return rates.multiply * kNano;
    case 4:
      return rates.near * kNano;
    case 8:
      return rates.far * kNano;
    case 16:
      return rates.wide * kNano;
    default:
      return 0;
  }
}

}  // extern "C"
