// Asks for weights ahead of their use. Takes the walk of a micro-kernel over the steps of its tiles.
#pragma once

#include <immintrin.h>

#include "common/unroll.hpp"
#include "nm/permute.hpp"

namespace sparsecomp {
namespace {

// How far ahead: DRAM latency at the rate of the widest micro-kernel. The hardware prefetcher stops at 4 KB pages and
// does not know where the next tiles begin.
constexpr int64_t kPrefetchBytes = 4096;
// The same for a tile on its own.
constexpr int64_t kPrefetchOneTile = 6144;

class Prefetcher {
 public:
  // `value_bytes`, `metadata_bytes`: of a block, as args.geometry has them.
  Prefetcher(const PermuteArgs& args, int64_t value_bytes, int64_t metadata_bytes, int64_t ahead = kPrefetchBytes)
      : args_(args), value_bytes_(value_bytes), metadata_bytes_(metadata_bytes) {
    const int64_t blocks = ahead / value_bytes + 1;
    if (blocks < args.steps) {
      left_ = args.steps - blocks;
      values_ = args.values + blocks * value_bytes;
      metadata_ = args.metadata + blocks * metadata_bytes;
    } else {
      jump();
    }
  }

  // The block of tile `t` that lies ahead; Bytes of values, or as many as the geometry says if 0. Always inlined: GCC
  // takes a function that does nothing but prefetch for one without effect, and leaves out the calls.
  template <int Bytes>
  SPARSECOMP_INLINE void tile(int t) const {
    const uint8_t* block = values_ + t * args_.value_stride;
    const int64_t bytes = Bytes ? Bytes : value_bytes_;
    for (int64_t byte = 0; byte < bytes; byte += 64)
      _mm_prefetch(reinterpret_cast<const char*>(block + byte), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(metadata_ + t * args_.metadata_stride), _MM_HINT_T0);
  }

  void advance() {
    values_ += value_bytes_;
    metadata_ += metadata_bytes_;
    if (--left_ == 0) jump();
  }

 private:
  void jump() {
    left_ = -1;
    values_ = args_.next_values;
    metadata_ = args_.next_metadata;
  }

  const PermuteArgs& args_;
  int64_t value_bytes_, metadata_bytes_;
  const uint8_t* values_;
  const uint8_t* metadata_;
  int64_t left_;  // steps until the next tiles
};

}  // namespace
}  // namespace sparsecomp
