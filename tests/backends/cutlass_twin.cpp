// The slow and obvious twin of csrc/cuda/wgmma_sp.cu: the same C ABI on host memory, one sum after another in double.
//
// The place of a byte of metadata is spelled out from CUTLASS's Sm90GemmSparseConfig (shapes (8,2,4) x (16,2,4), orders
// (3,1,5) x (0,4,2)), not from our packer. ELEMENT is 0 for fp16, 1 for bf16 and 2 for fp8 e4m3 with a bf16 result.
#include "wgmma_sp.h"

#include <cmath>
#include <cstring>

namespace {

double of_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<double>(value);
}

double of_bfloat(uint16_t bits) {
  uint32_t const wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

[[maybe_unused]] double of_e4m3(uint8_t bits) {
  int const exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  double const size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return bits & 128 ? -size : size;
}

double input(void const* base, int64_t index) {
#if ELEMENT == 0
  return of_half(static_cast<uint16_t const*>(base)[index]);
#elif ELEMENT == 1
  return of_bfloat(static_cast<uint16_t const*>(base)[index]);
#else
  return of_e4m3(static_cast<uint8_t const*>(base)[index]);
#endif
}

double output(void const* base, int64_t index) {
  uint16_t const bits = static_cast<uint16_t const*>(base)[index];
  return ELEMENT == 0 ? of_half(bits) : of_bfloat(bits);
}

void store(void* base, int64_t index, double value) {
  uint16_t bits;
  if (ELEMENT == 0) {
    _Float16 const narrow = static_cast<_Float16>(value);
    std::memcpy(&bits, &narrow, 2);
  } else {
    float const wide = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &wide, 4);
    bits = std::isnan(wide) ? 0x7fc0 : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  static_cast<uint16_t*>(base)[index] = bits;
}

double activated(double v, int kind) {
  switch (kind) {
    case 1:
      return v < 0 ? 0 : v;
    case 2:
      return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case 3:
      return v / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case 4:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

int64_t metadata_byte(int64_t row, int64_t column, int64_t rows) {
  int64_t const m0 = row % 8, m1 = row / 8 % 2, m2 = row / 16 % 4;
  int64_t const k0 = column % 16, k1 = column / 16 % 2, k2 = column / 32 % 4;
#if ELEMENT == 2
  int64_t const inside = row % 64 * 128 + column % 128;
  (void)m0, (void)m1, (void)m2, (void)k0, (void)k1, (void)k2;
#else
  int64_t const inside = k0 + 16 * m1 + 32 * k2 + 128 * m0 + 1024 * k1 + 2048 * m2;
#endif
  return (inside + row / 64 * 8192 + column / 128 * (rows * 128)) / 8;
}

bool aligned(void const* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

extern "C" int sparsecomp_wgmma_sp_abi(void) { return SPARSECOMP_WGMMA_SP_ABI; }

extern "C" char const* sparsecomp_wgmma_sp_error(int result) { return result == 1 ? "misaligned" : "out of range"; }

extern "C" int sparsecomp_wgmma_sp(sparsecomp_wgmma_sp_arguments const* arguments, void*) {
  sparsecomp_wgmma_sp_arguments const& a = *arguments;
  int const in_row = ELEMENT == 2 ? 16 : 8;
  if (!aligned(a.values) || !aligned(a.metadata) || !aligned(a.x) || !aligned(a.y) || a.x_stride % in_row ||
      a.y_stride % 8) {
    return 1;
  }
  if (a.out < 1 || a.tokens < 1 || a.columns < 1 || a.x_stride < a.columns || a.y_stride < a.out || a.swizzle < 1) {
    return 2;
  }
  int64_t const depth = (a.columns + 127) / 128 * 128, rows = (a.out + 63) / 64 * 64;
  auto const* metadata = static_cast<uint8_t const*>(a.metadata);
  for (int64_t token = 0; token < a.tokens; ++token) {
    for (int64_t row = 0; row < a.out; ++row) {
      double sum = 0;
      for (int64_t group = 0; group * 4 < depth; ++group) {
        int const nibble = metadata[metadata_byte(row, 4 * group, rows)] >> (group % 2 * 4) & 15;
        int const positions[2] = {nibble & 3, nibble >> 2};
        if (positions[0] >= positions[1]) return 3;
        for (int slot = 0; slot < 2; ++slot) {
          int64_t const column = 4 * group + positions[slot];
          // beyond the last column the tensor copy engine reads zeros
          double const x = column < a.columns ? input(a.x, token * a.x_stride + column) : 0;
          sum += input(a.values, row * depth / 2 + 2 * group + slot) * x;
        }
      }
#if ELEMENT == 2
      sum *= a.weight_scales[a.scale_per_row ? row : 0];
      sum *= a.x_scales[a.scale_per_token ? token : 0];
#endif
      if (a.bias != nullptr) sum += output(a.bias, row);
      store(a.y, token * a.y_stride + row, activated(sum, a.activation));
    }
  }
  return 0;
}
