// The element types: their sizes; fp32 <-> the 16-bit types, and from int8, one element at a time. Rounds to nearest
// even; NaN stays NaN.
// Everything is `static`: each instruction set compiles its own copy, and the linker must not give one to the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparsecomp.h"

namespace sparsecomp {

static inline int element_bytes(int dtype) { return dtype == SPARSECOMP_F32 ? 4 : dtype == SPARSECOMP_I8 ? 1 : 2; }

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float bf16_to_float(uint16_t value) { return bits_float(uint32_t{value} << 16); }

static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // rounding could carry a NaN into Inf
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float f16_to_float(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000) << 16;
  const uint32_t exponent = (value >> 10) & 0x1f;
  const uint32_t fraction = value & 0x3ff;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(fraction) * bits_float(0x33800000);
    return bits_float(float_bits(magnitude) | sign);
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

static inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to Inf
  if (magnitude < 0x38800000) {
    // below the smallest normal: adding 0.5 puts the last fp16 fraction bit at the last fp32 one, rounded by the FPU
    const float shifted = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

static inline float load_number(const void* data, int64_t index, int dtype) {
  if (dtype == SPARSECOMP_I8) return static_cast<float>(static_cast<const int8_t*>(data)[index]);
  if (dtype == SPARSECOMP_F32) return static_cast<const float*>(data)[index];
  const uint16_t value = static_cast<const uint16_t*>(data)[index];
  return dtype == SPARSECOMP_F16 ? f16_to_float(value) : bf16_to_float(value);
}

static inline void store_number(float value, void* data, int64_t index, int dtype) {
  if (dtype == SPARSECOMP_F32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = dtype == SPARSECOMP_F16 ? float_to_f16(value) : float_to_bf16(value);
}

}  // namespace sparsecomp
