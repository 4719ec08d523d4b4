// The N:M patterns that have kernels of their own: the one list that the kernels of each instruction set are made and
// chosen from, and that tests/csrc takes its cases from. Knows nothing of instructions.
//
// A kernel that knows N walks over the slots of a step without a loop. A pattern that is not listed has the kernels of
// its M, which read N from the weight; a family may have none of these.
#pragma once

#include <cstddef>
#include <utility>

#include "nm/layout.hpp"

namespace sparsecomp {
namespace {

struct Pattern {
  int n, m;
};

constexpr std::size_t kMostPatterns = 16;

struct ListedKernels {
  const char* isa;
  const char* family;
  Pattern patterns[kMostPatterns] = {};  // up to the first N = 0

  constexpr std::size_t count() const {
    std::size_t i = 0;
    while (i < kMostPatterns && patterns[i].n != 0) ++i;
    return i;
  }
};

// "permute": permute.cpp, any batch. "panel": panel.cpp, rows with masks of their own. "shared panel": panel.cpp, rows
// that share a mask by fours. avx512_bf16: of bf16 weights, others have those of avx512.
constexpr ListedKernels kKernelList[] = {
    {"avx512_bf16", "permute", {{1, 4}, {2, 4}, {2, 8}, {4, 8}, {4, 16}, {8, 16}}},
    {"avx512_bf16", "shared panel", {{2, 4}, {8, 16}}},
    {"avx512", "permute", {{1, 4}, {2, 4}, {2, 8}, {4, 8}, {4, 16}, {8, 16}}},
    {"avx512", "panel", {{1, 2}, {1, 4}, {2, 4}, {3, 4}, {2, 8}, {4, 8}, {6, 8}, {4, 16}, {8, 16}, {10, 16}, {12, 16}}},
    {"avx512", "shared panel", {{2, 4}, {8, 16}}},
    {"avx2", "permute", {{1, 2}, {2, 2}, {1, 4}, {2, 4}, {3, 4}, {4, 4}, {4, 8}, {8, 16}}},
    {"avx2", "panel", {{1, 2}, {1, 4}, {2, 4}, {3, 4}, {2, 8}, {4, 8}, {6, 8}, {4, 16}, {8, 16}, {10, 16}, {12, 16}}},
    {"avx2", "shared panel", {{2, 4}, {4, 8}, {8, 16}}},
    {"neon", "permute", {{2, 4}, {8, 16}}},
};

constexpr bool same_text(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

// The place of a line of the list; a compile error where it has none, since there is nothing to return.
constexpr std::size_t line_of(const char* isa, const char* family) {
  std::size_t i = 0;
  while (!same_text(kKernelList[i].isa, isa) || !same_text(kKernelList[i].family, family)) ++i;
  return i;
}

// A pattern as a type. N = 0: any N.
template <int M, int N>
struct PatternOf {
  static constexpr int kM = M, kN = N;
};

// make(PatternOf<M, N>()) for the weight's pattern if line `Line` of the list has it, else nullptr.
template <std::size_t Line, class Set, class Make, std::size_t... I>
const Set* own_kernels(const Geometry& g, const Make& make, std::index_sequence<I...>) {
  constexpr const Pattern(&kPatterns)[kMostPatterns] = kKernelList[Line].patterns;
  const Set* found = nullptr;
  const auto try_one = [&](auto pattern) {
    if (g.n == pattern.kN && g.m == pattern.kM) found = make(pattern);
  };
  (try_one(PatternOf<kPatterns[I].m, kPatterns[I].n>()), ...);
  return found;
}

template <std::size_t Line, class Set, class Make>
const Set* own_kernels(const Geometry& g, const Make& make) {
  return own_kernels<Line, Set>(g, make, std::make_index_sequence<kKernelList[Line].count()>());
}

// The same, but make(PatternOf<M, 0>()) for the weight's M instead of nullptr.
template <std::size_t Line, class Set, class Make>
const Set* own_or_group_kernels(const Geometry& g, const Make& make) {
  if (const Set* own = own_kernels<Line, Set>(g, make)) return own;
  return g.m == 2   ? make(PatternOf<2, 0>())
         : g.m == 4 ? make(PatternOf<4, 0>())
         : g.m == 8 ? make(PatternOf<8, 0>())
                    : make(PatternOf<16, 0>());
}

}  // namespace
}  // namespace sparsecomp
