// The values of a layout fetched anew from a dense weight, by a list of where each lies there.
#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"
#include "sparsecomp.h"

namespace {

constexpr int64_t kChunk = 1 << 15;  // values of a task
// Below this many values a second thread costs more than it saves.
constexpr int64_t kManyValues = 1 << 16;

template <class T>
void gather(const T* source, uint64_t size, const int32_t* index, int64_t count, T* values) {
  for (int64_t i = 0; i < count; ++i) {
    // a negative number becomes one beyond every size
    const auto place = static_cast<uint64_t>(int64_t{index[i]});
    values[i] = place < size ? source[place] : T{0};
  }
}

}  // namespace

extern "C" int sparsecomp_gather(int32_t bytes, const void* source, int64_t size, const int32_t* index, int64_t count,
                                 void* values, int threads) {
  if ((bytes != 2 && bytes != 4) || size < 0 || count < 0) return SPARSECOMP_INVALID;
  if (count == 0) return SPARSECOMP_OK;
  if ((size > 0 && !source) || !index || !values) return SPARSECOMP_INVALID;
  const int64_t tasks = (count + kChunk - 1) / kChunk;
  sparsecomp::parallel_for(count < kManyValues ? 1 : sparsecomp::resolve_threads(threads), tasks, [&](int64_t task) {
    const int64_t first = task * kChunk, some = std::min(kChunk, count - first);
    const auto all = static_cast<uint64_t>(size);
    if (bytes == 4) {
      gather(static_cast<const uint32_t*>(source), all, index + first, some, static_cast<uint32_t*>(values) + first);
    } else {
      gather(static_cast<const uint16_t*>(source), all, index + first, some, static_cast<uint16_t*>(values) + first);
    }
  });
  return SPARSECOMP_OK;
}
