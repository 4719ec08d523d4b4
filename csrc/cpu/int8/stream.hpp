// Asks for weights ahead of their use: the hardware prefetcher stops at 4 KB pages, and does not know where the next
// tiles begin.
#pragma once

#include "common/unroll.hpp"
#include "int8/linear.hpp"

namespace sparsecomp::int8 {
namespace {

// DRAM latency at the rate of the memory.
constexpr int64_t kAheadBytes = 6144;

class Stream {
 public:
  // `value_bytes`, `metadata_bytes`: of a round.
  Stream(const MicroArgs& args, int64_t value_bytes, int64_t metadata_bytes) : args_(args) {
    const int64_t ahead = kAheadBytes / (value_bytes + metadata_bytes) + 1;
    if (ahead < args.rounds) {
      left_ = args.rounds - ahead;
      values_ = args.values + ahead * value_bytes;
      metadata_ = args.metadata + ahead * metadata_bytes;
    } else {
      jump();
    }
  }

  // The round of T tiles that lies ahead. Always inlined: GCC takes a function that does nothing but prefetch for one
  // without effect, and leaves out the calls.
  template <int T, int ValueBytes, int MetadataBytes>
  SPARSECOMP_INLINE void next() {
    SPARSECOMP_UNROLL
    for (int t = 0; t < T; ++t) {
      for (int byte = 0; byte < ValueBytes; byte += 64) ask(values_ + t * args_.value_stride + byte);
      for (int byte = 0; byte < MetadataBytes; byte += 64) ask(metadata_ + t * args_.metadata_stride + byte);
    }
    values_ += ValueBytes;
    metadata_ += MetadataBytes;
    if (--left_ == 0) jump();
  }

 private:
  static SPARSECOMP_INLINE void ask(const uint8_t* line) { __builtin_prefetch(line); }

  void jump() {
    left_ = -1;
    values_ = args_.next_values;
    metadata_ = args_.next_metadata;
  }

  const MicroArgs& args_;
  const uint8_t* values_;
  const uint8_t* metadata_;
  int64_t left_;  // rounds until the next tiles
};

}  // namespace
}  // namespace sparsecomp::int8
