// Compares the N:M kernels of the instruction set in use (SPARSECOMP_ISA) with the scalar reference, for every pattern
// of nm/kernel_list.hpp and others, on random weights and shapes, with every buffer exactly as large as the contract
// says, so that a sanitizer or a guard page sees any access beyond it.
//   cmake --workflow --preset sanitize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "common/numbers.hpp"
#include "dispatch.hpp"
#include "nm/kernel_list.hpp"
#include "nm/layout.hpp"
#include "nm/panel.hpp"
#include "nm/permute.hpp"
#include "nm/reference.hpp"
#include "sparsecomp.h"
#include "testing.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

// Whose kernels a product is computed by, and whether by panels wherever there are some, also where they do not pay, or
// never. Without a Choice a product is computed as this process would.
struct Choice {
  Processor of;
  bool panels;
};

// Two processors: no maker's, and one that has every kernel of its own that there is: made by Intel, and slow where a
// multiply-add has a memory operand at two registers.
Processor plain(int64_t l1_bytes) { return {false, l1_bytes}; }
Processor particular(int64_t l1_bytes) { return {true, l1_bytes, {1, 1, 1, 2, 1}}; }
Processor either(int64_t l1_bytes) { return uniform(0, 1) == 1 ? particular(l1_bytes) : plain(l1_bytes); }

bool on_x86() { return std::strncmp(dispatch().name, "avx", 3) == 0; }

// Without panels: of other processors, and of Intel's, which have kernels and cuts of their own.
std::vector<Choice> all_kernels() {
  std::vector<Choice> choices{{plain(32 << 10), false}};
  if (on_x86()) choices.push_back({particular(32 << 10), false});
  return choices;
}

// Whether there are panels at all: without them every width of one is the same product by the kernels that permute.
bool has_panels() {
  Geometry g;
  const NmKernels* kernels = dispatch().nm;
  return kernels && make_geometry({16, 16, 2, 4, 1, SPARSECOMP_F32}, &g) && kernels->select_panels(g, plain(32 << 10));
}

int multiply(const sparsecomp_nm& weight, const Geometry& g, const LinearCall& call, const Choice* choice) {
  const Isa* isa = dispatch().isa;
  const NmKernels* kernels = dispatch().nm;
  if (!choice || !kernels || g.out == 0 || call.batch == 0)
    return sparsecomp_nm_linear(&weight, call.values, call.metadata, call.scales, call.dtype, call.x, call.ldx,
                                call.batch, &call.epilogue, call.y, call.ldy, call.threads);
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
  fill_positions(weight, &canonical_metadata);
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
  const float* factors = has_scales ? reinterpret_cast<const float*>(scales.data) : nullptr;
  const sparsecomp_epilogue epilogue{
      has_bias ? bias.data : nullptr,
      uniform(0, 1) == 1 ? SPARSECOMP_NO_ACTIVATION : static_cast<int32_t>(uniform(SPARSECOMP_RELU, SPARSECOMP_SILU))};
  const LinearCall call{values.data, metadata.data, factors, dtype, x.data, ldx, batch, epilogue, y.data, ldy, threads};
  const int done = multiply(weight, g, call, choice);
  CHECK(done == SPARSECOMP_OK, "%s", name.c_str());
  reference_linear(g, {values.data, metadata.data, factors, dtype, x.data, ldx, batch, epilogue, want.data, ldy, 1});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0; row < g.out; ++row) {
      const float got = load_number(y.data, b * ldy + row, dtype);
      const float expected = load_number(want.data, b * ldy + row, dtype);
      const float unit = dtype == SPARSECOMP_F32 ? 1e-5f : dtype == SPARSECOMP_F16 ? 2e-3f : 1.6e-2f;
      const float factor = (has_scales ? std::fabs(factors[row]) : 1.0f) * (g.dtype == SPARSECOMP_I8 ? 128.0f : 1.0f);
      const float scale = std::fabs(expected) + factor * std::sqrt(static_cast<float>(g.in) + 1) + 1;
      CHECK(std::fabs(got - expected) <= unit * scale, "%s: y[%d][%d] is %g, not %g", name.c_str(), static_cast<int>(b),
            static_cast<int>(row), static_cast<double>(got), static_cast<double>(expected));
    }
    for (int64_t row = g.out; row < ldy && b + 1 < batch; ++row)
      for (int i = 0; i < x_size; ++i)
        CHECK(y.data[static_cast<size_t>((b * ldy + row) * x_size + i)] == 0xa5, "%s wrote between rows", name.c_str());
  }
}

bool is_listed(const ListedKernels& line, int n, int m) {
  return std::any_of(line.patterns, line.patterns + line.count(),
                     [&](Pattern each) { return each.n == n && each.m == m; });
}

// All patterns that some instruction set has kernels of its own for.
const std::vector<Pattern>& listed_patterns() {
  static const std::vector<Pattern> patterns = [] {
    std::vector<Pattern> found;
    for (int m = 2; m <= 16; m *= 2)
      for (int n = 1; n <= m; ++n)
        if (std::any_of(std::begin(kKernelList), std::end(kKernelList),
                        [&](const ListedKernels& line) { return is_listed(line, n, m); }))
          found.push_back({n, m});
    return found;
  }();
  return patterns;
}

// The kernels of a pattern in one family, for the element type that the instruction set in use is there for.
const void* selected(const char* family, int32_t n, int32_t m) {
  const int32_t dtype = same_text(dispatch().name, "avx512_bf16") ? SPARSECOMP_BF16 : SPARSECOMP_F32;
  Geometry g;
  CHECK(make_geometry({16, 16, n, m, same_text(family, "shared panel") ? 4 : 1, dtype}, &g), "geometry");
  const Processor of = plain(32 << 10);
  if (same_text(family, "permute")) return dispatch().nm->select(g, of);
  return dispatch().nm->select_panels(g, of);
}

// What is listed is what is chosen: a pattern on the list has kernels that no other has; those that are not share
// theirs, or have none.
void check_list() {
  for (const ListedKernels& line : kKernelList) {
    if (!same_text(line.isa, dispatch().name)) continue;
    for (int32_t m = 2; m <= 16; m *= 2) {
      std::vector<const void*> own, others;
      for (int32_t n = 1; n <= m; ++n) (is_listed(line, n, m) ? own : others).push_back(selected(line.family, n, m));
      std::sort(own.begin(), own.end());
      CHECK(std::unique(own.begin(), own.end()) == own.end(), "%s %s N:%d share kernels", line.isa, line.family, m);
      for (const void* each : others) {
        CHECK(each == others.front(), "%s %s N:%d: kernels that are not listed", line.isa, line.family, m);
        CHECK(!std::binary_search(own.begin(), own.end(), each), "%s %s N:%d: kernels that are not chosen", line.isa,
              line.family, m);
      }
    }
  }
}

// Every width of a panel, alone and beside others, with columns left empty in its transposed and its permuted part; the
// weights are longer than what a micro-kernel takes at a time. The panels of both kinds of processor.
void compare_widths() {
  constexpr int64_t kUnit = 8, kLeastUnits = 1, kMostUnitsAlone = 16;
  for (const Pattern pattern : listed_patterns()) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t units = kLeastUnits; units <= 2 * kMostUnitsAlone + 2; ++units) {
        const Choice some{either(16 << 10), true};
        const int64_t in = uniform(0, 1) == 1 ? 160 : uniform(130, 160);
        compare_with_reference({uniform(1, 40), in, pattern.n, pattern.m, 1, dtype},
                               units * kUnit - uniform(0, kUnit - 1), uniform(0, 2), static_cast<int>(uniform(1, 3)),
                               true, &some);
      }
    }
  }
}

// The same for rows that share masks, over several tiles of which the last is cut.
void compare_shared_widths() {
  constexpr int64_t kUnit = 16, kLeastUnits = 1, kMostUnits = 13;
  for (const int32_t m : {4, 8, 16}) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t units = kLeastUnits; units <= kMostUnits; ++units) {
        for (const Processor& of : {plain(16 << 10), particular(16 << 10)}) {
          const Choice panels{of, true};
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
  for (const Pattern pattern : listed_patterns()) {
    for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16, SPARSECOMP_I8}) {
      for (int64_t batch = 1; batch <= kMostColumnsAtOnce + 1; ++batch) {
        const int64_t in = 16 * uniform(1, 10);
        for (const Choice& of : all_kernels()) {
          compare_with_reference({uniform(1, 70), in, pattern.n, pattern.m, 1, dtype}, batch, in % 32, 1,
                                 uniform(0, 1) == 1, &of);
          compare_with_reference({uniform(1, 40), uniform(1, 180), pattern.n, pattern.m, 1, dtype}, batch,
                                 uniform(0, 3), static_cast<int>(uniform(1, 2)), uniform(0, 1) == 1, &of);
        }
      }
      for (const Choice& of : all_kernels()) {
        compare_with_reference({uniform(1, 40), 1120, pattern.n, pattern.m, 1, dtype}, kMostColumnsAtOnce, 0, 1, true,
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
    compare_with_reference(weight, uniform(0, 40), uniform(0, 3), static_cast<int>(uniform(1, 3)), uniform(0, 1) == 1);
  }
  // wide enough for panels of x: full ones, several, with empty lanes, with rows that share masks, with many steps
  for (int i = 0; i < count / 4; ++i) {
    const std::vector<Pattern>& patterns = listed_patterns();
    const Pattern pattern = patterns[static_cast<size_t>(uniform(0, static_cast<int64_t>(patterns.size()) - 1))];
    sparsecomp_nm weight;
    weight.m = pattern.m;
    weight.mask_rows = static_cast<int32_t>(4 * uniform(0, 2));
    weight.n = static_cast<int32_t>(weight.mask_rows ? uniform(1, weight.m) : pattern.n);
    weight.mask_rows = weight.mask_rows ? weight.mask_rows : 1;
    weight.dtype = static_cast<int32_t>(uniform(SPARSECOMP_F32, SPARSECOMP_I8));
    weight.out_features = uniform(1, 40);
    weight.in_features = i % 2 == 0 ? 16 * uniform(0, 9) : uniform(0, 150);
    const int64_t batch = 16 * uniform(1, 20) - (uniform(0, 1) == 1 ? uniform(0, 5) : 0);
    const Choice some{either(uniform(1, 3) << 14), true};
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
      const Choice panels{plain(32 << 10), true};
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
  sparsecomp_nm_linear(&weight, values.data, metadata.data, nullptr, dtype, x.data, g.in, batch, nullptr, y.data, g.out,
                       1);
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

void check_refusals() {
  const sparsecomp_nm good{4, 8, 2, 4, 1, SPARSECOMP_F32};
  for (sparsecomp_nm bad : {sparsecomp_nm{4, 8, 5, 4, 1, SPARSECOMP_F32}, sparsecomp_nm{4, 8, 2, 3, 1, SPARSECOMP_F32},
                            sparsecomp_nm{-1, 8, 2, 4, 1, SPARSECOMP_F32}, sparsecomp_nm{4, 8, 2, 4, 0, SPARSECOMP_F32},
                            sparsecomp_nm{4, 8, 2, 4, 1, 9}}) {
    CHECK(sparsecomp_nm_values_bytes(&bad) == -1, "a bad description has no size");
    CHECK(sparsecomp_nm_linear(&bad, "", "", nullptr, SPARSECOMP_F32, "", 8, 1, nullptr, &bad, 4, 1) ==
              SPARSECOMP_INVALID,
          "refused");
  }
  Buffer y(16);
  CHECK(sparsecomp_nm_linear(&good, nullptr, nullptr, nullptr, SPARSECOMP_F32, nullptr, 8, 1, nullptr, y.data, 4, 1) ==
            SPARSECOMP_INVALID,
        "null weight");
  const int32_t most = 0x7fffffff;
  const sparsecomp_nm huge{most, most, 4, 4, 1, SPARSECOMP_F32};
  CHECK(sparsecomp_nm_values_bytes(&huge) == -1, "its bytes do not fit 64 bits");
  const sparsecomp_epilogue unknown{nullptr, SPARSECOMP_SILU + 1};
  CHECK(sparsecomp_nm_linear(&good, "", "", nullptr, SPARSECOMP_F32, "", 8, 1, &unknown, y.data, 4, 1) ==
            SPARSECOMP_INVALID,
        "activation");
  CHECK(sparsecomp_nm_linear(&good, "", "", nullptr, SPARSECOMP_F32, "", 7, 2, nullptr, y.data, 4, 1) ==
            SPARSECOMP_INVALID,
        "short ldx");
  CHECK(sparsecomp_nm_linear(&good, "", "", nullptr, SPARSECOMP_BF16, "", 8, 1, nullptr, y.data, 4, 1) ==
            SPARSECOMP_UNSUPPORTED,
        "x of another type");
  const sparsecomp_nm bytes{4, 8, 2, 4, 1, SPARSECOMP_I8};
  CHECK(sparsecomp_nm_linear(&bytes, "", "", nullptr, SPARSECOMP_I8, "", 8, 1, nullptr, y.data, 4, 1) ==
            SPARSECOMP_UNSUPPORTED,
        "int8 x");
}

}  // namespace

int main() {
  if (const char* error = sparsecomp_isa_error()) {
    std::printf("skipped: %s\n", error);
    return kSkipped;
  }
  check_refusals();
  if (dispatch().nm) check_list();
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
