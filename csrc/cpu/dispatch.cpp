#include "dispatch.hpp"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sparsecomp {
namespace {

struct Candidate {
  const char* name;
  const Isa* isa;
  const NmKernels* nm;
  const BlockKernels* blocks;
  const int8::Kernels* int8;
};

#if defined(__x86_64__)

// The register files that the operating system saves at a context switch.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool bit(unsigned word, int index) { return (word >> index) & 1; }

std::vector<Candidate> supported() {
  std::vector<Candidate> found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool base = bit(c, 27) && bit(c, 28) && bit(c, 12) && bit(c, 29);  // OSXSAVE, AVX, FMA, F16C
  unsigned a7, b7, c7, d7;
  if (!base || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return found;
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;
  const uint64_t state = saved_state();
  const bool avx2 = bit(b7, 5) && (state & kYmm) == kYmm;
  const bool avx512 = avx2 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && (state & kZmm) == kZmm;
  unsigned a71 = 0;
  if (a7 >= 1 && !__get_cpuid_count(7, 1, &a71, &b, &c, &d)) a71 = 0;
  // the first processors with AVX-512 had no VNNI; it has 512 bits there and, in later ones without AVX-512, 256
  const int8::Kernels* rounded = bit(c7, 11) ? &int8::kAvx512Vnni : &int8::kAvx2;
  if (avx512 && bit(a71, 5)) found.push_back({"avx512_bf16", &kAvx512Bf16, &kNmAvx512Bf16, &kBlockAvx512, rounded});
  if (avx512) found.push_back({"avx512", &kAvx512, &kNmAvx512, &kBlockAvx512, rounded});
  if (avx2 && bit(a71, 4)) found.push_back({"avx2_vnni", &kAvx2, &kNmAvx2, &kBlockAvx2, &int8::kAvx2Vnni});
  if (avx2) found.push_back({"avx2", &kAvx2, &kNmAvx2, &kBlockAvx2, &int8::kAvx2});
  return found;
}

#elif defined(__aarch64__)

#if defined(__linux__)
// HWCAP_ASIMDDP, which older headers lack.
bool has_dot_products() { return (getauxval(AT_HWCAP) >> 20) & 1; }
#else
bool has_dot_products() { return false; }
#endif

// NEON is part of the architecture.
std::vector<Candidate> supported() {
  std::vector<Candidate> found;
  if (has_dot_products()) found.push_back({"neon_dotprod", &kNeon, &kNmNeon, &kBlockNeon, &int8::kNeonDotprod});
  found.push_back({"neon", &kNeon, &kNmNeon, &kBlockNeon, &int8::kNeon});
  return found;
}

#else

std::vector<Candidate> supported() { return {}; }

#endif

// Python takes messages in UTF-8 only, the environment may hold any bytes.
std::string printable(std::string text) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

struct State {
  std::string available, error;
  Dispatch dispatch;

  State() {
    std::vector<Candidate> candidates = supported();
    candidates.push_back({"reference", nullptr, nullptr, nullptr, nullptr});
    for (const Candidate& candidate : candidates)
      available += (available.empty() ? "" : ",") + std::string(candidate.name);
    Candidate chosen = candidates.front();
    if (const char* wanted = std::getenv("SPARSECOMP_ISA"); wanted && *wanted) {
      const auto match = std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& candidate) {
        return std::string(wanted) == candidate.name;
      });
      if (match != candidates.end())
        chosen = *match;
      else
        error = "SPARSECOMP_ISA=" + printable(wanted) + " cannot run on this machine; it can run " + available +
                ": set SPARSECOMP_ISA to one of these or unset it";
    }
    dispatch = {chosen.name,
                chosen.isa,
                chosen.nm,
                chosen.blocks,
                chosen.int8,
                available.c_str(),
                error.empty() ? nullptr : error.c_str()};
  }
};

}  // namespace

const Dispatch& dispatch() {
  static const State state;
  return state.dispatch;
}

}  // namespace sparsecomp
