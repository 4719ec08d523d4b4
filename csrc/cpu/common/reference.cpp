#include "common/reference.hpp"

#include <cmath>

#include "common/numbers.hpp"

namespace sparsecomp {
namespace {

// In double: the truth for the vector formulas.
float activate(float value, int activation) {
  const double v = static_cast<double>(value);
  switch (activation) {
    case SPARSECOMP_RELU:
      return value < 0 ? 0.0f : value;
    case SPARSECOMP_GELU:
      return static_cast<float>(v * std::erfc(v * -0.70710678118654752) / 2);
    case SPARSECOMP_GELU_TANH:
      return static_cast<float>(v / (1 + std::exp(v * (-1.5957691216057308 - 0.071354816272600247 * v * v))));
    case SPARSECOMP_SILU:
      return static_cast<float>(v / (1 + std::exp(-v)));
    default:
      return value;
  }
}

}  // namespace

void reference_finish(const LinearCall& call, float sum, int64_t row, int64_t column) {
  const float scale = call.scales ? call.scales[row] : 1.0f;
  const float bias = call.epilogue.bias ? load_number(call.epilogue.bias, row, call.dtype) : 0.0f;
  store_number(activate(sum * scale + bias, call.epilogue.activation), call.y, column * call.ldy + row, call.dtype);
}

}  // namespace sparsecomp
