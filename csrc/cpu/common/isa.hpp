// What one instruction set does for every family of kernels.
#pragma once

#include <cstdint>

#include "common/call.hpp"
#include "common/rates.hpp"

namespace sparsecomp {

struct Isa {
  void (*widen)(const void* from, int dtype, float* to, int64_t count);
  void (*finish)(const FinishArgs& args);
  double (*flops)(int dtype, double seconds);            // measured, of independent multiply-adds on this thread
  uint64_t (*read)(const uint8_t* from, int64_t bytes);  // reads as fast as this thread can
  void (*rates)(Rates* rates) = nullptr;                 // measured; nullptr: no kernel is chosen by them
};

#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAvx512Bf16;
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif

}  // namespace sparsecomp
