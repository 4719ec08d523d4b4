// Tests what all families of kernels share: the partition of work and tasks on threads, for core counts that this
// machine does not have, conversion of numbers, and hints to the operating system.
//   cmake --workflow --preset sanitize
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/numbers.hpp"
#include "common/pages.hpp"
#include "common/parallel.hpp"
#include "common/partition.hpp"
#include "sparsecomp.h"
#include "testing.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

void check_partition() {
  for (int i = 0; i < 20000; ++i) {
    const int64_t tiles = uniform(1, 1000), batch = uniform(1, 3000), steps = uniform(1, 700);
    const int slots = static_cast<int>(uniform(1, 16)), threads = static_cast<int>(uniform(1, 128));
    const int64_t most = 128;
    const Partition p = make_partition(tiles, batch, steps, slots, threads, most);
    CHECK(p.tile_block > 0 && p.batch_block > 0 && p.batch_block <= most, "sizes of blocks");
    CHECK(p.row_tasks * p.tile_block >= tiles && (p.row_tasks - 1) * p.tile_block < tiles, "rows covered once");
    CHECK(p.batch_tasks * p.batch_block >= batch && (p.batch_tasks - 1) * p.batch_block < batch, "batch covered once");
  }
  CHECK(make_partition(1, 8, 4, 8, 64, 128).tasks() == 1, "a tiny product is one task");
  CHECK(make_partition(256, 1, 256, 8, 1, 128).tasks() == 1, "one thread, one task");
  CHECK(make_partition(256, 1, 256, 8, 64, 128).tasks() >= 64, "rows keep 64 threads busy at batch 1");
  CHECK(make_partition(24, 4, 24, 8, 2, 128).tasks() % 2 == 0, "two threads have as many tasks");
  CHECK(make_partition(24, 1024, 24, 8, 64, 128).tasks() >= 64, "a narrow layer is split along the batch");
  for (int i = 0; i < 2000; ++i) {
    const int64_t tiles = uniform(0, 1000), most = uniform(0, 50), panels = uniform(1, 20);
    const int64_t block = panel_tile_block(tiles, most, panels, static_cast<int>(uniform(1, 128)));
    CHECK(block >= 1 && block <= std::max<int64_t>(1, most), "tiles of a task of panels");
  }
  CHECK(256 / panel_tile_block(256, 24, 1, 64) >= 64, "rows keep 64 threads busy with one panel");
}

void check_numbers() {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float half = f16_to_float(bits), brain = bf16_to_float(bits);
    CHECK(half != half ? float_to_f16(half) > (bits & 0x8000) + 0x7c00 : float_to_f16(half) == bits, "fp16 %x", i);
    CHECK(brain != brain ? (float_to_bf16(brain) & 0x7fff) > 0x7f80 : float_to_bf16(brain) == bits, "bf16 %x", i);
  }
}

// Hints must leave every byte as it is, wherever the memory begins and ends.
void check_pages() {
  constexpr int64_t kMost = 5 << 20;
  Buffer memory(kMost);
  for (const int64_t bytes : {int64_t{0}, int64_t{100}, int64_t{3} << 20, kMost - 7}) {
    prefer_huge_pages(memory.data + 7, bytes);
    for (int64_t i = 0; i < kMost; ++i) memory.data[i] = static_cast<uint8_t>(i * 31 >> 3);
    gather_huge_pages(memory.data + 7, bytes);
    int64_t changed = 0;
    for (int64_t i = 0; i < kMost; ++i) changed += memory.data[i] != static_cast<uint8_t>(i * 31 >> 3);
    CHECK(changed == 0, "%lld bytes changed", static_cast<long long>(changed));
  }
}

// Every task runs once, and is done when the call returns, also where threads outnumber tasks or the shares they have.
void check_tasks() {
  for (const int threads : {0, 1, 2, 3, 64, 65, 130}) {
    for (const int64_t tasks : {0, 1, 2, 5, 64, 65, 129, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::vector<int64_t> seen(static_cast<size_t>(tasks), -1);
      parallel_for(threads, tasks, [&](int64_t task) {
        ++runs[static_cast<size_t>(task)];
        seen[static_cast<size_t>(task)] = task;
      });
      for (int64_t task = 0; task < tasks; ++task) {
        const auto at = static_cast<size_t>(task);
        CHECK(runs[at] == 1 && seen[at] == task, "task %lld of %lld on %d threads ran %d times",
              static_cast<long long>(task), static_cast<long long>(tasks), threads, runs[at].load());
      }
    }
  }
}

// Every value is where its index says, or zero where there is no such element; nothing beside them is touched.
void check_gather() {
  CHECK(sparsecomp_gather(8, nullptr, 0, nullptr, 0, nullptr, 1) == SPARSECOMP_INVALID, "elements of 8 bytes");
  CHECK(sparsecomp_gather(4, nullptr, 1, nullptr, 1, nullptr, 1) == SPARSECOMP_INVALID, "no memory");
  CHECK(sparsecomp_gather(4, nullptr, 0, nullptr, 0, nullptr, 1) == SPARSECOMP_OK, "nothing to gather");
  for (int i = 0; i < 60; ++i) {
    const int bytes = i % 2 == 0 ? 4 : 2, threads = static_cast<int>(uniform(0, 3));
    const int64_t elements = uniform(0, 3000), count = i < 4 ? (1 << 16) + uniform(0, 5) : uniform(0, 3000);
    Buffer source(elements * bytes), index(count * 4), values(count * bytes);
    for (int64_t k = 0; k < source.size; ++k) source.data[k] = static_cast<uint8_t>(generator());
    for (int64_t k = 0; k < count; ++k) {
      const auto place = static_cast<int32_t>(uniform(-2, elements + 1));
      std::memcpy(index.data + 4 * k, &place, 4);
    }
    const int code = sparsecomp_gather(bytes, source.data, elements, reinterpret_cast<const int32_t*>(index.data),
                                       count, values.data, threads);
    CHECK(code == SPARSECOMP_OK, "code %d", code);
    int64_t wrong = 0;
    for (int64_t k = 0; k < count; ++k) {
      int32_t place;
      std::memcpy(&place, index.data + 4 * k, 4);
      const uint8_t zeros[4] = {};
      const bool known = place >= 0 && place < elements;
      wrong += std::memcmp(values.data + bytes * k, known ? source.data + int64_t{bytes} * place : zeros,
                           static_cast<size_t>(bytes)) != 0;
    }
    CHECK(wrong == 0, "%lld of %lld values", static_cast<long long>(wrong), static_cast<long long>(count));
  }
}

}  // namespace

int main() {
  check_gather();
  check_partition();
  check_tasks();
  check_numbers();
  check_pages();
  std::printf("common: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
