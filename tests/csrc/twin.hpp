// The slow, obvious twins that several test programs compare products with, written from sparsecomp.h alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp::testing {

// As torch.nn.functional defines them.
inline double activate(double v, int activation) {
  switch (activation) {
    case SPARSECOMP_RELU:
      return v < 0 ? 0.0 : v;
    case SPARSECOMP_GELU:
      return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case SPARSECOMP_GELU_TANH:
      return v / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    case SPARSECOMP_SILU:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

// A row of x as the product of an I8_A8 weight sees it: x is about integers * scale.
struct RoundedTwin {
  std::vector<int64_t> integers;  // q - zero point
  float scale;                    // NaN where x holds Inf or NaN

  RoundedTwin(const void* x, int64_t first, int64_t count, int dtype) : integers(static_cast<size_t>(count)) {
    float smallest = 0, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float number = load_number(x, first + i, dtype);
      if (!std::isfinite(number)) {
        scale = std::numeric_limits<float>::quiet_NaN();
        return;
      }
      smallest = std::min(smallest, number);
      largest = std::max(largest, number);
    }
    scale = std::max(largest / 254 - smallest / 254, std::numeric_limits<float>::min());
    const float inverse = 1 / scale;
    const int64_t zero_point = std::min<int64_t>(std::llrint(-smallest / scale) - 127, 127);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = std::llrint(load_number(x, first + i, dtype) * inverse) + zero_point;
      integers[static_cast<size_t>(i)] = std::clamp<int64_t>(q, -127, 127) - zero_point;
    }
  }

  // scale * the product with integer weights, before the scale of their row.
  template <class Integer>
  float product(const Integer* weights) const {
    int64_t sum = 0;
    for (size_t i = 0; i < integers.size(); ++i) sum += static_cast<int64_t>(weights[i]) * integers[i];
    return static_cast<float>(sum) * scale;
  }
};

// Whether `got` is activation(product * scale + bias) in `dtype`. Every instruction set adds the bias in one rounding,
// so that no bit may differ, but for activations by polynomials; the scalar reference rounds the product before.
inline bool is_finished(float got, float product, float scale, float bias, int activation, int dtype, bool reference) {
  const auto is_from = [&](float value) {
    const double exact = activate(static_cast<double>(value), activation);
    const auto single = static_cast<float>(exact);
    const float want = dtype == SPARSECOMP_F16    ? f16_to_float(float_to_f16(single))
                       : dtype == SPARSECOMP_BF16 ? bf16_to_float(float_to_bf16(single))
                                                  : single;
    if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
    if (got == want) return true;
    constexpr double kUnit[] = {0, 0x1p-10, 0x1p-7};  // of the last digit of y
    const double error = std::fabs(exact) * (0x1p-20 + kUnit[dtype]) + (dtype == SPARSECOMP_F16 ? 0x1p-23 : 1e-7);
    return activation > SPARSECOMP_RELU && std::fabs(static_cast<double>(got) - exact) <= error;
  };
  return is_from(std::fma(product, scale, bias)) || (reference && is_from(product * scale + bias));
}

}  // namespace sparsecomp::testing
