// What the test programs of the kernels share: checks that count, random numbers, and buffers of exactly the promised
// size.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "common/bits.hpp"
#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp::testing {

constexpr int kSkipped = 77;  // what ctest takes for "not run"
inline int failures = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      ++failures;                                                          \
    }                                                                      \
  } while (false)

inline std::mt19937_64 generator(1);

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Exactly `bytes` long: on the heap, where AddressSanitizer watches both ends, or up against a page that cannot be
// touched, which also catches the masked vector accesses that the sanitizer does not instrument.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : size(bytes), guarded_(uniform(0, 1) == 1) {
    if (guarded_) {
      const int64_t page = sysconf(_SC_PAGESIZE);
      mapped_ = (bytes + page - 1) / page * page + page;
      void* pages =
          mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) std::abort();
      base_ = static_cast<uint8_t*>(pages);
      if (mprotect(base_ + mapped_ - page, static_cast<size_t>(page), PROT_NONE) != 0) std::abort();
      data = base_ + mapped_ - page - bytes;
    } else {
      data = base_ = new uint8_t[static_cast<size_t>(bytes)];
    }
    std::memset(data, 0xa5, static_cast<size_t>(bytes));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (guarded_)
      munmap(base_, static_cast<size_t>(mapped_));
    else
      delete[] base_;
  }

  uint8_t* data;
  const int64_t size;

  // Multiples of 1/512 in [-2, 2), which every type holds exactly but for some digits of bf16; any int8. Four of one
  // draw.
  void fill_numbers(int dtype) {
    const int64_t count = size / element_bytes(dtype);
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i, bits >>= 16) {
      if (i % 4 == 0) bits = generator();
      if (dtype == SPARSECOMP_I8)
        data[i] = static_cast<uint8_t>(bits);
      else
        store_number(static_cast<float>(static_cast<int>(bits & 2047) - 1024) / 512, data, i, dtype);
    }
  }

 private:
  const bool guarded_;
  uint8_t* base_;
  int64_t mapped_ = 0;
};

// Canonical metadata (docs/format.md) of random ascending positions.
inline void fill_positions(const sparsecomp_nm& weight, Buffer* metadata) {
  std::memset(metadata->data, 0, static_cast<size_t>(metadata->size));
  const int bits = position_bits(weight.m);
  const int64_t slots = (weight.in_features + weight.m - 1) / weight.m * weight.n, row_bytes = (slots * bits + 7) / 8;
  for (int64_t row = 0; row * row_bytes < metadata->size && row_bytes > 0; ++row) {
    for (int64_t slot = 0; slot < slots;) {
      int left = weight.n;
      for (int position = 0; left > 0; ++position) {
        if (uniform(1, weight.m - position) > left) continue;
        for (int bit = 0; bit < bits; ++bit) {
          const int64_t at = slot * bits + bit;
          if (position >> bit & 1) metadata->data[row * row_bytes + at / 8] |= 1 << (at % 8);
        }
        ++slot;
        --left;
      }
    }
  }
}

}  // namespace sparsecomp::testing
