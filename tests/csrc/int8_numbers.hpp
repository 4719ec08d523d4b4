// Weights and rows of x that int8 products may take for something else: ends of ranges, ties, signs, sizes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "sparsecomp.h"
#include "testing.hpp"

namespace sparsecomp::testing {

// to 64; 127; -128; one of the two; 64 and 65 in turn, or -64 and -65, of which two times 255 are just beyond 16 bits
enum class Weights { kAny, kSmall, kLargest, kSmallest, kMixed, kBeyond, kBelow };
// kTies: halfway between two integers, as near as fp32 comes to it
enum class Row {
  kMixed,
  kPositive,
  kNegative,
  kZero,
  kOnes,
  kMinusOnes,
  kTies,
  kSubnormal,
  kHuge,
  kOutlier,
  kInf,
  kNan
};
constexpr int kRows = 12;

inline int8_t weight_at(Weights kind, int64_t slot) {
  switch (kind) {
    case Weights::kSmall:
      return static_cast<int8_t>(uniform(-64, 64));
    case Weights::kLargest:
      return 127;
    case Weights::kSmallest:
      return -128;
    case Weights::kMixed:
      return uniform(0, 1) == 1 ? 127 : -128;
    case Weights::kBeyond:
      return slot % 2 == 0 ? 64 : 65;
    case Weights::kBelow:
      return slot % 2 == 0 ? -64 : -65;
    default:
      return static_cast<int8_t>(uniform(-128, 127));
  }
}

// Number i of a row, `turn` being the same for all of it.
inline float random_number(Row kind, int64_t i, int64_t turn, int dtype) {
  const auto any = static_cast<float>(uniform(-1000000, 1000000)) / 700000;
  switch (kind) {
    case Row::kPositive:
      return std::fabs(any) + 3;
    case Row::kNegative:
      return -std::fabs(any) - 3;
    case Row::kZero:
      return i % 2 == 0 ? 0.0f : -0.0f;
    case Row::kOnes:
      return 1;
    case Row::kMinusOnes:
      return -1;
    case Row::kTies:
      return (static_cast<float>((i < 2 ? 254 * i : uniform(0, 254)) - turn % 254) - 0.5f) /
             static_cast<float>(turn % 7 + 1);
    case Row::kSubnormal:
      return any * (dtype == SPARSECOMP_F16 ? 1e-6f : 1e-40f);
    case Row::kHuge:
      return any * (dtype == SPARSECOMP_F16 ? 4e4f : 1e30f);
    case Row::kOutlier:
      return i == 0 ? 6e4f : any;
    case Row::kInf:
      return i == 0 ? -std::numeric_limits<float>::infinity() : any;
    case Row::kNan:
      return i == 0 ? std::numeric_limits<float>::quiet_NaN() : any;
    default:
      return any;
  }
}

}  // namespace sparsecomp::testing
