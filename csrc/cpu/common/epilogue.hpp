// What becomes of the sums of a product: y = activation(scale * sum + bias), rounded to the type of y.
// The formulas stand here once for registers of any width. `V` is one instruction set's register of fp32 lanes; see
// Lanes in x86/avx512.cpp. Each instruction set compiles its own copy.
#pragma once

#include <cstddef>

#include "common/call.hpp"

namespace sparsecomp {
namespace {

// c[0] + c[1] v + c[2] v^2 + ...
template <class V, std::size_t Count>
inline typename V::Float polynomial(const float (&c)[Count], typename V::Float v) {
  typename V::Float sum = V::set(c[Count - 1]);
  for (std::size_t i = Count - 1; i-- > 0;) sum = V::fma(sum, v, V::set(c[i]));
  return sum;
}

// exp(-v) for v >= 0, to 1 ulp; +0 for Inf, some finite number for NaN.
template <class V>
inline typename V::Float exp_of_negative(typename V::Float v) {
  // exp(-104) rounds to zero. Of two arguments of which one is NaN, min gives the second.
  v = V::min(v, V::set(104.0f));
  // -v = count * log(2) + rest, |rest| <= log(2) / 2; log(2) in two parts, the first with few enough bits that count
  // times it is exact
  const typename V::Float count = V::round(v * V::set(-1.44269504f));
  typename V::Float rest = V::fma(count, V::set(-0.693145751953125f), V::set(0.0f) - v);
  rest = V::fma(count, V::set(-1.42860682e-6f), rest);
  // (exp(r) - 1 - r) / r^2 on that interval: minimax fit, relative error of exp 3e-9
  constexpr float kFit[] = {0.49999994f, 0.1666652f, 0.041668393f, 0.008368781f, 0.0013814465f};
  const typename V::Float one = V::set(1.0f);
  const typename V::Float fraction = V::fma(rest * rest, polynomial<V>(kFit, rest), rest) + one;
  return V::times_power_of_2(fraction, count);
}

// 1 / (1 + exp(-v)), to a few ulp in both tails.
template <class V>
inline typename V::Float logistic(typename V::Float v) {
  const typename V::Float small = exp_of_negative<V>(V::abs(v)), one = V::set(1.0f);
  return V::if_negative(v, small, one) / (one + small);
}

// The normal distribution function Phi(v), to a few ulp in both tails.
template <class V>
inline typename V::Float normal(typename V::Float v) {
  // beyond 14.5 Phi(-a) is below the smallest fp32 number
  const typename V::Float a = V::min(V::abs(v), V::set(14.5f));
  const typename V::Float square = a * a, lost = V::fma(a, a, V::set(0.0f) - square);
  typename V::Float density = exp_of_negative<V>(square * V::set(0.5f));
  density = V::fma(density * lost, V::set(-0.5f), density);  // the rounding of a * a, magnified by exp
  // Phi(-a) exp(a^2 / 2) / t with t = 1 / (1 + 0.3 a), on [0, 14.5]: minimax fit, relative error 4e-9
  constexpr float kFit[] = {0.11968669f,  0.11957181f, 0.11023547f,  0.07838944f, 0.09615744f,
                            -0.07942464f, 0.19178593f, -0.22821465f, 0.11243606f, -0.02062355f};
  const typename V::Float one = V::set(1.0f);
  const typename V::Float t = one / V::fma(a, V::set(0.3f), one);
  const typename V::Float tail = density * t * polynomial<V>(kFit, t);
  return V::if_negative(v, tail, one - tail);
}

// Inf and NaN as in torch: each product below keeps NaN, and -Inf times a probability of zero is NaN.
template <class V, int Activation>
inline typename V::Float activate(typename V::Float v) {
  switch (Activation) {
    case SPARSECOMP_RELU:
      return V::max(V::set(0.0f), v);  // of two arguments of which one is NaN, max gives the second
    case SPARSECOMP_GELU:
      return v * normal<V>(v);
    case SPARSECOMP_GELU_TANH:
      // (1 + tanh(u)) / 2 is the logistic function of 2u; here 2u = sqrt(8 / pi) (v + 0.044715 v^3)
      return v * logistic<V>(v * V::fma(v * v, V::set(0.071354816f), V::set(1.5957691f)));
    case SPARSECOMP_SILU:
      return v * logistic<V>(v);
    default:
      return v;
  }
}

template <class V, int Activation>
void finish_as(const FinishArgs& args) {
  const sparsecomp_epilogue& last = args.epilogue;
  for (int row = 0; row < args.rows; row += V::kLanes) {
    const typename V::Mask all = V::first(V::kLanes), lanes = V::first(args.rows - row);
    const typename V::Float scale = args.scales ? V::load(args.scales, row, SPARSECOMP_F32, lanes) : V::set(1.0f);
    const typename V::Float bias = last.bias ? V::load(last.bias, row, args.dtype, lanes) : V::set(0.0f);
    for (int b = 0; b < args.columns; ++b) {
      const typename V::Float sum = V::load(args.sums + b * args.ld, row, SPARSECOMP_F32, all);
      const typename V::Float value = activate<V, Activation>(V::fma(sum, scale, bias));
      V::store(value, args.y, b * args.ldy + row, args.dtype, lanes);
    }
  }
}

template <class V>
void finish_lanes(const FinishArgs& args) {
  switch (args.epilogue.activation) {
    case SPARSECOMP_RELU:
      return finish_as<V, SPARSECOMP_RELU>(args);
    case SPARSECOMP_GELU:
      return finish_as<V, SPARSECOMP_GELU>(args);
    case SPARSECOMP_GELU_TANH:
      return finish_as<V, SPARSECOMP_GELU_TANH>(args);
    case SPARSECOMP_SILU:
      return finish_as<V, SPARSECOMP_SILU>(args);
    default:
      return finish_as<V, SPARSECOMP_NO_ACTIVATION>(args);
  }
}

template <class V>
void widen_lanes(const void* from, int dtype, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const typename V::Mask lanes = V::first(count - i);
    V::store(V::load(from, i, dtype, lanes), to, i, SPARSECOMP_F32, lanes);
  }
}

}  // namespace
}  // namespace sparsecomp
