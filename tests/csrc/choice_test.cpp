// Tests which kernels of AVX2 serve a product, by the rates of processors that this machine is not. Nothing is timed.
//   cmake --workflow --preset sanitize
#include "nm/choice.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "dispatch.hpp"
#include "nm/kernel_list.hpp"
#include "nm/layout.hpp"
#include "nm/panel.hpp"
#include "sparsecomp.h"
#include "testing.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

// The fewest columns of the batch that panels serve; 0: none of up to 512.
int64_t first_of_panels(int32_t n, int32_t m, int32_t mask_rows, int64_t rows, const Rates& rates) {
  Geometry g;
  CHECK(make_geometry({rows, 768, n, m, mask_rows, SPARSECOMP_F32}, &g), "geometry");
  const PanelSet* panels = dispatch().nm->select_panels(g, {false, int64_t{32} << 10, rates});
  for (int64_t batch = 1; batch <= 512; ++batch)
    if (panels_pay(*panels, g, batch, 1, rates)) return batch;
  return 0;
}

// On AVX2 rates decide, not the make: those of a processor that permutes as fast as it multiplies (Zen 5), and of one
// that does not (Zen 3), of which 128 bits are permuted at twice the rate of 256.
void check_choice() {
  constexpr Rates kZen5{5.71, 5.06, 2.72, 7.55, 7.55}, kZen3{2.95, 1.5, 0.8, 6.0, 6.0};
  const auto starts = [](const Rates& rates, int32_t n, int32_t m, int32_t mask_rows = 1, int64_t rows = 768) {
    return first_of_panels(n, m, mask_rows, rows, rates);
  };
  CHECK(starts(kZen5, 2, 4) == 30, "2:4 where permutes are fast: %d", static_cast<int>(starts(kZen5, 2, 4)));
  CHECK(starts(kZen3, 2, 4) == 12, "2:4 where they are not: %d", static_cast<int>(starts(kZen3, 2, 4)));
  CHECK(starts(kZen3, 4, 8) == 5, "4:8: %d", static_cast<int>(starts(kZen3, 4, 8)));
  CHECK(starts(kZen3, 8, 16) == 3, "8:16: %d", static_cast<int>(starts(kZen3, 8, 16)));
  CHECK(starts(kZen3, 2, 4, 4) < starts(kZen3, 2, 4), "rows that share masks");
  CHECK(starts(kZen5, 2, 4, 1, 16) == 0, "sixteen rows are not worth packing where permutes are fast");
  CHECK(starts(kZen3, 2, 4, 1, 16) >= starts(kZen3, 2, 4), "nor earlier where they are not");
  for (int i = 0; i < 2000; ++i) {
    const auto rate = [](int64_t most) { return static_cast<double>(uniform(1, most)) / 100; };
    Rates rates{rate(1000), rate(1000), rate(1000), rate(1000), rate(1000)};
    const Pattern of[] = {{1, 2}, {2, 4}, {4, 8}, {8, 16}};
    const Pattern pattern = of[uniform(0, 3)];
    const int64_t rows = uniform(1, 4000), first = starts(rates, pattern.n, pattern.m, 1, rows);
    rates.near *= 2, rates.far *= 2, rates.wide *= 2;
    const int64_t later = starts(rates, pattern.n, pattern.m, 1, rows);
    CHECK(later == 0 || (first != 0 && first <= later), "faster permutes serve no fewer columns: %d, %d",
          static_cast<int>(first), static_cast<int>(later));
    rates.near *= 3, rates.far *= 3, rates.wide *= 3, rates.multiply *= 6, rates.indexed *= 6;
    CHECK(starts(rates, pattern.n, pattern.m, 1, rows) == first, "a faster clock changes nothing");
  }
}

// Every rate was measured here, and is told through the C ABI.
void check_measured() {
  const Rates& rates = processor(*dispatch().isa).rates;
  for (const double rate : {rates.near, rates.far, rates.wide, rates.multiply, rates.indexed})
    CHECK(rate > 0 && rate < 1000, "%g per ns", rate);
  CHECK(sparsecomp_pair_rate(4) == rates.near * 1e9 && sparsecomp_pair_rate(1) == rates.multiply * 1e9, "the same");
  CHECK(sparsecomp_pair_rate(5) == 0, "there are no groups of 5");
}

}  // namespace

int main() {
  if (sparsecomp_isa_error() || std::strcmp(dispatch().name, "avx2") != 0) {
    std::printf("skipped: kernels of %s are chosen otherwise\n", dispatch().name);
    return kSkipped;
  }
  check_choice();
  check_measured();
  std::printf("choice: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
