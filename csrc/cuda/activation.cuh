// Activations of the epilogue, chosen when the kernel is launched: one library serves all of them.
#pragma once

#include "cutlass/array.h"
#include "cutlass/cutlass.h"

namespace sparsecomp {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// x times the logistic function of t. The quotient's approximation is good to 2 ulp, and 0 for a divisor above 2^126.
CUTLASS_DEVICE float logistic(float x, float t) { return __fdividef(x, 1.f + __expf(-t)); }

struct Relu {
  CUTLASS_DEVICE float operator()(float x) const { return x < 0.f ? 0.f : x; }  // a NaN stays
};
struct Gelu {
  CUTLASS_DEVICE float operator()(float x) const { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
};
struct GeluTanh {
  // (1 + tanh u) / 2 is the logistic function of 2u; 1.596 is 2 sqrt(2 / pi)
  CUTLASS_DEVICE float operator()(float x) const {
    return logistic(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  }
};
struct Silu {
  CUTLASS_DEVICE float operator()(float x) const { return logistic(x, x); }
};

struct ActivationArguments {
  int kind = kNone;
};

template <class T>
struct ActivationFunction {
  using Arguments = ActivationArguments;
};

template <int N>
struct ActivationFunction<cutlass::Array<float, N>> {
  using Arguments = ActivationArguments;
  using Values = cutlass::Array<float, N>;

  CUTLASS_DEVICE Values operator()(Values const& values, Arguments const& arguments) const {
    switch (arguments.kind) {
      case kRelu:
        return each(values, Relu{});
      case kGelu:
        return each(values, Gelu{});
      case kGeluTanh:
        return each(values, GeluTanh{});
      case kSilu:
        return each(values, Silu{});
      default:
        return values;
    }
  }

 private:
  template <class Function>
  CUTLASS_DEVICE static Values each(Values const& values, Function function) {
    Values result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      result[i] = function(values[i]);
    }
    return result;
  }
};

}  // namespace sparsecomp
