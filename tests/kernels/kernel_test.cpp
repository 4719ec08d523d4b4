// Compares the instruction set in use (SPARSECOMP_ISA) with the scalar reference on random weights and shapes, with
// every buffer exactly as large as the contract says, so that a sanitizer or a guard page sees any access beyond it.
// Also tests the partition of work, and tasks on threads, for core counts that this machine does not have.
//   cmake --workflow --preset sanitize
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/numbers.hpp"
#include "common/pages.hpp"
#include "common/parallel.hpp"
#include "common/partition.hpp"
#include "dispatch.hpp"
#include "nm/layout.hpp"
#include "nm/panel.hpp"
#include "nm/permute.hpp"
#include "nm/reference.hpp"
#include "sparsecomp.h"
#include "testing.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

// Canonical metadata of random ascending positions.
void fill_positions(const Geometry& g, Buffer* metadata) {
  std::memset(metadata->data, 0, static_cast<size_t>(metadata->size));
  const int64_t row_bytes = g.canonical_metadata_bytes();
  for (int64_t row = 0; row * row_bytes < metadata->size && row_bytes > 0; ++row) {
    for (int64_t slot = 0; slot < g.canonical_slots();) {
      int left = g.n;
      for (int position = 0; left > 0; ++position) {
        if (uniform(1, g.m - position) > left) continue;
        for (int bit = 0; bit < g.bits; ++bit) {
          const int64_t at = slot * g.bits + bit;
          if (position >> bit & 1) metadata->data[static_cast<size_t>(row * row_bytes + at / 8)] |= 1 << (at % 8);
        }
        ++slot;
        --left;
      }
    }
  }
}

// Whose kernels a product is computed by, and whether by panels wherever there are some, also where they do not pay, or
// never. Without a Choice a product is computed as this process would.
struct Choice {
  Processor of;
  bool panels;
};

bool on_x86() { return std::strncmp(dispatch().name, "avx", 3) == 0; }

// Without panels: of other processors, and of Intel's, which have kernels and cuts of their own.
std::vector<Choice> all_kernels() {
  std::vector<Choice> choices{{{false, int64_t{32} << 10}, false}};
  if (on_x86()) choices.push_back({{true, int64_t{32} << 10}, false});
  return choices;
}

// Whether there are panels at all: without them every width of one is the same product by the kernels that permute.
bool has_panels() {
  Geometry g;
  const NmKernels* kernels = dispatch().nm;
  return kernels && make_geometry({16, 16, 2, 4, 1, SPARSECOMP_F32}, &g) &&
         kernels->select_panels(g, {false, int64_t{32} << 10});
}

int multiply(const sparsecomp_nm& weight, const Geometry& g, const LinearCall& call, const Choice* choice) {
  const Isa* isa = dispatch().isa;
  const NmKernels* kernels = dispatch().nm;
  if (!choice || !kernels || g.out == 0 || call.batch == 0)
    return sparsecomp_nm_linear(&weight, call.values, call.metadata, call.dtype, call.x, call.ldx, call.batch,
                                &call.epilogue, call.y, call.ldy, call.threads);
  const PanelSet* panels = choice->panels ? kernels->select_panels(g, choice->of) : nullptr;
  if (panels && call.batch >= panels->least_batch) return panel_linear(*isa, *panels, g, call, choice->of);
  return permute_linear(*isa, *kernels->select(g, choice->of), g, call, choice->of);
}

void compare_with_reference(const sparsecomp_nm& weight, int64_t batch, int64_t gap, int threads, bool has_bias,
                            const Choice* choice = nullptr) {
  Geometry g;
  CHECK(make_geometry(weight, &g), "geometry");
  const int size = element_bytes(g.dtype);
  const std::string name = std::to_string(g.out) + "x" + std::to_string(g.in) + " " + std::to_string(g.n) + ":" +
                           std::to_string(g.m) + "@v" + std::to_string(g.mask_rows) + " dtype " +
                           std::to_string(g.dtype) + " batch " + std::to_string(batch);

  Buffer canonical_values(g.out * g.canonical_slots() * size);
  Buffer canonical_metadata((g.out + g.mask_rows - 1) / g.mask_rows * g.canonical_metadata_bytes());
  canonical_values.fill_numbers(g.dtype);
  fill_positions(g, &canonical_metadata);
  Buffer values(sparsecomp_nm_values_bytes(&weight)), metadata(sparsecomp_nm_metadata_bytes(&weight));
  CHECK(sparsecomp_nm_pack(&weight, canonical_values.data, canonical_metadata.data, values.data, metadata.data) ==
            SPARSECOMP_OK,
        "%s", name.c_str());
  Buffer back_values(canonical_values.size), back_metadata(canonical_metadata.size);
  CHECK(
      sparsecomp_nm_unpack(&weight, values.data, metadata.data, back_values.data, back_metadata.data) == SPARSECOMP_OK,
      "%s", name.c_str());
  CHECK(std::memcmp(back_values.data, canonical_values.data, static_cast<size_t>(back_values.size)) == 0,
        "values of %s do not come back", name.c_str());
  CHECK(std::memcmp(back_metadata.data, canonical_metadata.data, static_cast<size_t>(back_metadata.size)) == 0,
        "metadata of %s does not come back", name.c_str());
  Buffer dense(g.out * g.in * size);
  CHECK(sparsecomp_nm_to_dense(&weight, values.data, metadata.data, dense.data, threads) == SPARSECOMP_OK, "%s",
        name.c_str());

  const int64_t ldx = g.in + gap, ldy = g.out + gap;
  const int dtype = g.dtype == SPARSECOMP_I8 ? static_cast<int>(uniform(SPARSECOMP_F32, SPARSECOMP_BF16)) : g.dtype;
  const int x_size = element_bytes(dtype);
  const auto extent = [&](int64_t ld, int64_t row) { return batch == 0 ? 0 : ((batch - 1) * ld + row) * x_size; };
  Buffer x(extent(ldx, g.in)), bias(g.out * x_size), y(extent(ldy, g.out)), want(extent(ldy, g.out));
  x.fill_numbers(dtype);
  bias.fill_numbers(dtype);
  Buffer scales(g.out * 4);
  scales.fill_numbers(SPARSECOMP_F32);
  const bool has_scales = uniform(0, 1) == 1;
  const sparsecomp_epilogue epilogue{
      has_scales ? reinterpret_cast<const float*>(scales.data) : nullptr, has_bias ? bias.data : nullptr,
      uniform(0, 1) == 1 ? SPARSECOMP_NO_ACTIVATION : static_cast<int32_t>(uniform(SPARSECOMP_RELU, SPARSECOMP_SILU))};
  const LinearCall call{values.data, metadata.data, dtype, x.data, ldx, batch, epilogue, y.data, ldy, threads};
  const int done = multiply(weight, g, call, choice);
  CHECK(done == SPARSECOMP_OK, "%s", name.c_str());
  reference_linear(g, {values.data, metadata.data, dtype, x.data, ldx, batch, epilogue, want.data, ldy, 1});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0; row < g.out; ++row) {
      const float got = load_number(y.data, b * ldy + row, dtype);
      const float expected = load_number(want.data, b * ldy + row, dtype);
      const float unit = dtype == SPARSECOMP_F32 ? 1e-5f : dtype == SPARSECOMP_F16 ? 2e-3f : 1.6e-2f;
      const float factor =
          (has_scales ? std::fabs(epilogue.row_scales[row]) : 1.0f) * (g.dtype == SPARSECOMP_I8 ? 128.0f : 1.0f);
      const float scale = std::fabs(expected) + factor * std::sqrt(static_cast<float>(g.in) + 1) + 1;
      CHECK(std::fabs(got - expected) <= unit * scale, "%s: y[%d][%d] is %g, not %g", name.c_str(), static_cast<int>(b),
            static_cast<int>(row), static_cast<double>(got), static_cast<double>(expected));
    }
    for (int64_t row = g.out; row < ldy && b + 1 < batch; ++row)
      for (int i = 0; i < x_size; ++i)
        CHECK(y.data[static_cast<size_t>((b * ldy + row) * x_size + i)] == 0xa5, "%s wrote between rows", name.c_str());
  }
}

// Patterns whose rows need not share masks for the product over panels.
constexpr int32_t kPanelPatterns[][2] = {{1, 2}, {1, 4},  {2, 4},  {3, 4},   {2, 8},  {4, 8},
                                         {6, 8}, {4, 16}, {8, 16}, {10, 16}, {12, 16}};

// Every width of a panel, alone and beside others, with columns left empty in its transposed and its permuted part; the
// weights are longer than what a micro-kernel takes at a time. The panels of both kinds of processor.
void compare_widths() {
  constexpr int64_t kUnit = 8, kLeastUnits = 2, kMostUnitsAlone = 16;
  for (const int32_t* pattern : kPanelPatterns) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t units = kLeastUnits; units <= 2 * kMostUnitsAlone + 2; ++units) {
        const Choice some{{uniform(0, 1) == 1, int64_t{16} << 10}, true};
        const int64_t in = uniform(0, 1) == 1 ? 160 : uniform(130, 160);
        compare_with_reference({uniform(1, 40), in, pattern[0], pattern[1], 1, dtype},
                               units * kUnit - uniform(0, kUnit - 1), uniform(0, 2), static_cast<int>(uniform(1, 3)),
                               true, &some);
      }
    }
  }
}

// The same for rows that share masks, over several tiles of which the last is cut.
void compare_shared_widths() {
  constexpr int64_t kUnit = 16, kLeastUnits = 2, kMostUnits = 13;
  for (const int32_t m : {4, 8, 16}) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t units = kLeastUnits; units <= kMostUnits; ++units) {
        for (const bool intel : {false, true}) {
          const Choice panels{{intel, int64_t{16} << 10}, true};
          compare_with_reference({uniform(49, 63), uniform(130, 160), m / 2, m, 4, dtype},
                                 units * kUnit - uniform(0, kUnit - 1), uniform(0, 2), 1, true, &panels);
        }
      }
    }
  }
}

// Every number of batch columns that a micro-kernel takes, of both kinds of processor; rows of x that begin on lines
// and are read in place, and any.
void compare_columns() {
  constexpr int64_t kMostColumnsAtOnce = 16;
  for (const int32_t* pattern : kPanelPatterns) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t batch = 1; batch <= kMostColumnsAtOnce + 1; ++batch) {
        const int64_t in = 16 * uniform(1, 10);
        for (const Choice& of : all_kernels()) {
          compare_with_reference({uniform(1, 70), in, pattern[0], pattern[1], 1, dtype}, batch, in % 32, 1,
                                 uniform(0, 1) == 1, &of);
          compare_with_reference({uniform(1, 40), uniform(1, 180), pattern[0], pattern[1], 1, dtype}, batch,
                                 uniform(0, 3), static_cast<int>(uniform(1, 2)), uniform(0, 1) == 1, &of);
        }
      }
      for (const Choice& of : all_kernels()) {
        compare_with_reference({uniform(1, 40), 1120, pattern[0], pattern[1], 1, dtype}, kMostColumnsAtOnce, 0, 1, true,
                               &of);
      }
    }
  }
}

void compare_random(int count) {
  for (int i = 0; i < count; ++i) {
    sparsecomp_nm weight;
    weight.m = 2 << uniform(0, 3);
    weight.n = static_cast<int32_t>(i % 3 == 0 ? weight.m / 2 : uniform(1, weight.m));
    weight.mask_rows = static_cast<int32_t>(i % 4 == 0 ? uniform(1, 5) : 1);
    weight.dtype = static_cast<int32_t>(uniform(SPARSECOMP_F32, SPARSECOMP_I8));
    weight.out_features = uniform(0, 70);
    weight.in_features = i % 5 == 0 ? 16 * uniform(0, 12) : uniform(0, 200);
    compare_with_reference(weight, uniform(0, 20), uniform(0, 3), static_cast<int>(uniform(1, 3)), uniform(0, 1) == 1);
  }
  // wide enough for panels of x: full ones, several, with empty lanes, with rows that share masks, with many steps
  for (int i = 0; i < count / 4; ++i) {
    const int32_t* pattern = kPanelPatterns[uniform(0, 10)];
    sparsecomp_nm weight;
    weight.m = pattern[1];
    weight.mask_rows = static_cast<int32_t>(4 * uniform(0, 2));
    weight.n = static_cast<int32_t>(weight.mask_rows ? uniform(1, weight.m) : pattern[0]);
    weight.mask_rows = weight.mask_rows ? weight.mask_rows : 1;
    weight.dtype = static_cast<int32_t>(uniform(SPARSECOMP_F32, SPARSECOMP_I8));
    weight.out_features = uniform(1, 40);
    weight.in_features = i % 2 == 0 ? 16 * uniform(0, 9) : uniform(0, 150);
    const int64_t batch = 16 * uniform(1, 20) - (uniform(0, 1) == 1 ? uniform(0, 5) : 0);
    const Choice some{{uniform(0, 1) == 1, uniform(1, 3) << 14}, true};
    compare_with_reference(weight, batch, uniform(0, 3), static_cast<int>(uniform(1, 3)), uniform(0, 1) == 1, &some);
  }
  for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16})  // in several tasks
    compare_with_reference({500, 300, 2, 4, dtype == SPARSECOMP_BF16 ? 4 : 1, dtype}, 144, 1, 2, true);
  // panels packed by the thread that multiplies them (one by two threads; three, of which two share one), and by all
  for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_BF16, SPARSECOMP_I8}) {
    const int32_t mask_rows = dtype == SPARSECOMP_BF16 ? 4 : 1;
    compare_with_reference({400, 160, 2, 4, mask_rows, dtype}, 90, 1, 2, true);
    for (const int threads : {2, 3, 8})
      compare_with_reference({200, 160, 2, 4, mask_rows, dtype}, 330, 1, threads, true);
  }
  compare_with_reference({900, 640, 8, 16, 1, SPARSECOMP_F32}, 260, 0, 2, true);
  // long enough to be cut along the columns
  for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
    for (const Choice& of : all_kernels()) {
      compare_with_reference({20, 6500, 2, 4, 1, dtype}, 18, 1, 2, true, &of);
      compare_with_reference({20, 2064, 2, 4, 1, dtype}, 100, 1, 1, true, &of);  // Intel's only
    }
  }
  // an odd number of slots in a step, where values lie in pairs of slots and panels take them one by one
  for (int32_t dtype : {SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
    for (const int32_t n : {1, 3, 13, 15}) {
      const Choice panels{{false, int64_t{32} << 10}, true};
      compare_with_reference({40, 160, n, 16, 4, dtype}, 96, 1, 1, true, &panels);
    }
  }
  // cut where the halves would have an odd number of steps, which two at a time cannot take
  for (const int64_t in : {6417, 6432, 6432, 6432}) {
    for (const int32_t n : {8, 13}) compare_with_reference({40, in, n, 16, 1, SPARSECOMP_BF16}, 18, 0, 1, true);
    // tasks of 16 and 9 columns
    compare_with_reference({40, in, 1, 16, 1, SPARSECOMP_BF16}, 25, 0, 8, true);
  }
}

// Inf in a column that no slot names must not be seen, also where kernels take slots in pairs and their number is odd.
void check_unnamed_columns(int32_t dtype, int32_t n, int32_t mask_rows, int64_t batch) {
  const sparsecomp_nm weight{16, 32, n, 16, mask_rows, dtype};
  Geometry g;
  CHECK(make_geometry(weight, &g), "geometry");
  const int size = element_bytes(dtype);
  Buffer canonical_values(g.out * g.canonical_slots() * size);
  Buffer canonical_metadata(g.out / mask_rows * g.canonical_metadata_bytes());
  std::memset(canonical_metadata.data, 0, static_cast<size_t>(canonical_metadata.size));
  for (int64_t i = 0; i < g.out * g.canonical_slots(); ++i) store_number(1, canonical_values.data, i, dtype);
  for (int64_t i = 0; i < g.out / mask_rows * g.canonical_slots(); ++i) {
    const int64_t bit = i % g.canonical_slots() * 4;
    uint8_t* row = canonical_metadata.data + i / g.canonical_slots() * g.canonical_metadata_bytes();
    row[bit / 8] |= static_cast<uint8_t>((10 + i % n) << (bit % 8));  // columns 10 and up
  }
  Buffer values(sparsecomp_nm_values_bytes(&weight)), metadata(sparsecomp_nm_metadata_bytes(&weight));
  Buffer x(batch * g.in * size), y(batch * g.out * size);
  for (int64_t k = 0; k < batch * g.in; ++k) store_number(k % 16 < 10 ? INFINITY : 1.0f, x.data, k, dtype);
  sparsecomp_nm_pack(&weight, canonical_values.data, canonical_metadata.data, values.data, metadata.data);
  sparsecomp_nm_linear(&weight, values.data, metadata.data, dtype, x.data, g.in, batch, nullptr, y.data, g.out, 1);
  for (int64_t i = 0; i < batch * g.out; ++i)
    CHECK(load_number(y.data, i, dtype) == static_cast<float>(2 * n), "%d:16@v%d dtype %d batch %d", n, mask_rows,
          dtype, static_cast<int>(batch));
}

void check_unnamed_columns() {
  for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16}) {
    for (int32_t n : {1, 3, 5}) {
      check_unnamed_columns(dtype, n, 1, 1);
      check_unnamed_columns(dtype, n, 4, 96);
    }
    check_unnamed_columns(dtype, 4, 1, 4200);  // enough for panels of AVX2
  }
}

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

void check_refusals() {
  const sparsecomp_nm good{4, 8, 2, 4, 1, SPARSECOMP_F32};
  for (sparsecomp_nm bad : {sparsecomp_nm{4, 8, 5, 4, 1, SPARSECOMP_F32}, sparsecomp_nm{4, 8, 2, 3, 1, SPARSECOMP_F32},
                            sparsecomp_nm{-1, 8, 2, 4, 1, SPARSECOMP_F32}, sparsecomp_nm{4, 8, 2, 4, 0, SPARSECOMP_F32},
                            sparsecomp_nm{4, 8, 2, 4, 1, 9}}) {
    CHECK(sparsecomp_nm_values_bytes(&bad) == -1, "a bad description has no size");
    CHECK(sparsecomp_nm_linear(&bad, "", "", SPARSECOMP_F32, "", 8, 1, nullptr, &bad, 4, 1) == SPARSECOMP_INVALID,
          "refused");
  }
  Buffer y(16);
  CHECK(sparsecomp_nm_linear(&good, nullptr, nullptr, SPARSECOMP_F32, nullptr, 8, 1, nullptr, y.data, 4, 1) ==
            SPARSECOMP_INVALID,
        "null weight");
  const int32_t most = 0x7fffffff;
  const sparsecomp_nm huge{most, most, 4, 4, 1, SPARSECOMP_F32};
  CHECK(sparsecomp_nm_values_bytes(&huge) == -1, "its bytes do not fit 64 bits");
  const sparsecomp_epilogue unknown{nullptr, nullptr, SPARSECOMP_SILU + 1};
  CHECK(sparsecomp_nm_linear(&good, "", "", SPARSECOMP_F32, "", 8, 1, &unknown, y.data, 4, 1) == SPARSECOMP_INVALID,
        "activation");
  CHECK(sparsecomp_nm_linear(&good, "", "", SPARSECOMP_F32, "", 7, 2, nullptr, y.data, 4, 1) == SPARSECOMP_INVALID,
        "short ldx");
  CHECK(sparsecomp_nm_linear(&good, "", "", SPARSECOMP_BF16, "", 8, 1, nullptr, y.data, 4, 1) == SPARSECOMP_UNSUPPORTED,
        "x of another type");
  const sparsecomp_nm bytes{4, 8, 2, 4, 1, SPARSECOMP_I8};
  CHECK(sparsecomp_nm_linear(&bytes, "", "", SPARSECOMP_I8, "", 8, 1, nullptr, y.data, 4, 1) == SPARSECOMP_UNSUPPORTED,
        "int8 x");
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

}  // namespace

int main() {
  if (const char* error = sparsecomp_isa_error()) {
    std::printf("skipped: %s\n", error);
    return kSkipped;
  }
  check_partition();
  check_tasks();
  check_numbers();
  check_pages();
  check_refusals();
  check_unnamed_columns();
  CHECK(has_panels() || !on_x86(), "x86 has panels");
  if (has_panels()) {
    compare_widths();
    compare_shared_widths();
  }
  compare_columns();
  compare_random(600);
  std::printf("%s: %d failures\n", sparsecomp_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
