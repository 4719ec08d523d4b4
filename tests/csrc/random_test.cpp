// Random products of random weights against float64, for the instruction set in use (SPARSECOMP_ISA); those that round
// activations to int8 against exact integers.
//   random_test [--count N] [--seed S] [--case I]
// Case I of seed S is the same everywhere, whatever ran before it; a failure prints the line that repeats it alone.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "sparsecomp.h"
#include "testing.hpp"
#include "twin.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

struct Case {
  int64_t out, in, batch, gap_x, gap_y;
  int weight_dtype, dtype;  // of the weight; of x, the bias and y
  int threads, activation;
  bool has_bias, has_scales, block;
  int n, m, mask_rows;      // N:M
  int rows, cols, density;  // blocks, percent
  int largest;              // int8 weights reach from -largest - 1 to largest

  bool rounds() const { return weight_dtype == SPARSECOMP_I8_A8; }
  // How canonical values are stored.
  int stored_dtype() const { return rounds() ? SPARSECOMP_I8 : weight_dtype; }

  std::string text() const {
    const char* const dtypes[] = {"fp32", "fp16", "bf16", "int8", "int8@a8"};
    const char* const activations[] = {"", " relu", " gelu", " gelu_tanh", " silu"};
    const std::string pattern =
        block ? "block" + std::to_string(rows) + "x" + std::to_string(cols) + " at " + std::to_string(density) + "%"
              : std::to_string(n) + ":" + std::to_string(m) + "@v" + std::to_string(mask_rows);
    return pattern + " " + std::to_string(out) + "x" + std::to_string(in) + " " + dtypes[weight_dtype] + " by " +
           dtypes[dtype] + activations[activation] + " batch " + std::to_string(batch) + " gaps " +
           std::to_string(gap_x) + ", " + std::to_string(gap_y) + (has_scales ? " scales" : "") +
           (has_bias ? " bias" : " no bias") + " threads " + std::to_string(threads);
  }
};

// Mostly small, as faults sit at edges; now and then large enough for every way of cutting the work.
Case random_case() {
  Case c{};
  const bool large = uniform(1, 200) == 1;
  c.out = large ? uniform(1, 700) : uniform(0, 70);
  c.in = large ? uniform(1, 8000) : uniform(0, 3) == 0 ? 16 * uniform(0, 16) : uniform(0, 250);
  c.batch = large ? uniform(1, 40) : uniform(1, 8) == 1 ? uniform(35, 200) : uniform(0, 34);
  if (!large && uniform(1, 40) == 1) {  // enough rows and outputs for panels
    c.out = uniform(500, 800);
    c.batch = uniform(104, 300);
  }
  c.gap_x = uniform(0, 3);
  c.gap_y = uniform(0, 3);
  c.dtype = static_cast<int>(uniform(SPARSECOMP_F32, SPARSECOMP_BF16));
  c.weight_dtype = c.dtype;
  c.threads = static_cast<int>(uniform(1, 3));
  c.activation = uniform(0, 1) == 0 ? 0 : static_cast<int>(uniform(SPARSECOMP_RELU, SPARSECOMP_SILU));
  c.has_scales = uniform(0, 2) == 0;
  c.has_bias = uniform(0, 1) == 1;
  c.block = uniform(0, 2) == 0;
  if (c.block) {
    const bool usual = uniform(0, 1) == 1;
    c.rows = static_cast<int>(usual ? 1 << uniform(0, 6) : uniform(1, 40));
    c.cols = static_cast<int>(usual ? 1 << uniform(0, 6) : uniform(1, 40));
    c.density = static_cast<int>(uniform(0, 100));
  } else {
    c.m = 2 << uniform(0, 3);
    c.n = static_cast<int>(uniform(0, 2) == 0 ? c.m / 2 : uniform(1, c.m));
    const int64_t sharing = uniform(0, 7);  // rows that share a mask: most often those that kernels know
    c.mask_rows = static_cast<int>(sharing == 0 ? uniform(1, 5) : sharing == 1 ? 4 : sharing == 2 ? 8 : 1);
    const int64_t numbers = uniform(0, 5);
    if (numbers < 3) c.weight_dtype = numbers == 0 ? SPARSECOMP_I8 : SPARSECOMP_I8_A8;
    c.largest = static_cast<int>(uniform(0, 1) == 0 ? 127 : uniform(0, 127));  // some fit 16 bits in pairs, some do not
  }
  return c;
}

// A weight twice: dense in float64, and in canonical form (docs/format.md), written here from the specification.
struct Weight {
  std::vector<double> dense;
  std::vector<uint8_t> values, metadata;
  int64_t kept = 0;  // blocks

  // The next canonical value, at a place of the dense weight, or at one of the padding.
  void add(const Case& c, int64_t row, int64_t column) {
    const int dtype = c.stored_dtype();
    const auto size = static_cast<size_t>(element_bytes(dtype));
    values.resize(values.size() + size);
    uint8_t* slot = values.data() + values.size() - size;
    const bool real = row < c.out && column < c.in;
    if (dtype == SPARSECOMP_I8)
      *slot = real ? static_cast<uint8_t>(uniform(-c.largest - 1, c.largest)) : 0;
    else
      store_number(real ? static_cast<float>(uniform(-1000, 1000)) / 512 : 0.0f, slot, 0, dtype);
    if (real) dense[static_cast<size_t>(row * c.in + column)] = static_cast<double>(load_number(slot, 0, dtype));
  }
};

Weight random_nm(const Case& c) {
  Weight w;
  w.dense.assign(static_cast<size_t>(c.out * c.in), 0.0);
  const int64_t groups = (c.in + c.m - 1) / c.m;
  const int bits = c.m == 16 ? 4 : c.m == 8 ? 3 : c.m == 4 ? 2 : 1;
  const int64_t row_bytes = (groups * c.n * bits + 7) / 8;
  const int64_t mask_count = (c.out + c.mask_rows - 1) / c.mask_rows;
  w.metadata.assign(static_cast<size_t>(mask_count * row_bytes), 0);
  std::vector<int64_t> columns;
  for (int64_t row = 0; row < c.out; ++row) {
    if (row % c.mask_rows == 0) {
      columns.clear();
      for (int64_t group = 0; group < groups; ++group) {
        int left = c.n;
        for (int position = 0; left > 0; ++position) {
          if (uniform(1, c.m - position) > left) continue;
          const int64_t bit = static_cast<int64_t>(columns.size()) * bits;
          for (int i = 0; i < bits; ++i) {
            const int64_t at = row / c.mask_rows * row_bytes * 8 + bit + i;
            if (position >> i & 1) w.metadata[static_cast<size_t>(at / 8)] |= static_cast<uint8_t>(1 << (at % 8));
          }
          columns.push_back(group * c.m + position);
          --left;
        }
      }
    }
    for (int64_t column : columns) w.add(c, row, column);
  }
  return w;
}

Weight random_blocks(const Case& c) {
  Weight w;
  w.dense.assign(static_cast<size_t>(c.out * c.in), 0.0);
  const int64_t down = (c.out + c.rows - 1) / c.rows, across = (c.in + c.cols - 1) / c.cols;
  w.metadata.assign(static_cast<size_t>(down * ((across + 7) / 8)), 0);
  for (int64_t block_row = 0; block_row < down; ++block_row) {
    for (int64_t block_column = 0; block_column < across; ++block_column) {
      if (uniform(0, 99) >= c.density) continue;
      ++w.kept;
      w.metadata[static_cast<size_t>(block_row * ((across + 7) / 8) + block_column / 8)] |=
          static_cast<uint8_t>(1 << (block_column % 8));
      for (int64_t r = 0; r < c.rows; ++r)
        for (int64_t k = 0; k < c.cols; ++k) w.add(c, block_row * c.rows + r, block_column * c.cols + k);
    }
  }
  return w;
}

// y of the library, or its error code. Buffers are exactly as large as promised.
int multiply(const Case& c, const Weight& w, const float* scales, const Buffer& x, const sparsecomp_epilogue& last,
             Buffer* y) {
  const sparsecomp_nm nm{c.out, c.in, c.n, c.m, c.mask_rows, c.weight_dtype};
  const sparsecomp_block block{c.out, c.in, c.rows, c.cols, w.kept, c.weight_dtype};
  Buffer values(c.block ? sparsecomp_block_values_bytes(&block) : sparsecomp_nm_values_bytes(&nm));
  Buffer metadata(c.block ? sparsecomp_block_metadata_bytes(&block) : sparsecomp_nm_metadata_bytes(&nm));
  const int packed = c.block
                         ? sparsecomp_block_pack(&block, w.values.data(), w.metadata.data(), values.data, metadata.data)
                         : sparsecomp_nm_pack(&nm, w.values.data(), w.metadata.data(), values.data, metadata.data);
  if (packed != SPARSECOMP_OK) return packed;
  const int64_t ldx = c.in + c.gap_x, ldy = c.out + c.gap_y;
  return c.block ? sparsecomp_block_linear(&block, values.data, metadata.data, scales, c.dtype, x.data, ldx, c.batch,
                                           &last, y->data, ldy, c.threads)
                 : sparsecomp_nm_linear(&nm, values.data, metadata.data, scales, c.dtype, x.data, ldx, c.batch, &last,
                                        y->data, ldy, c.threads);
}

// The bound on rounding: fp32 sums in any order, some ulp per root of the terms, which no activation widens by more
// than its steepest slope, 1.13; the activation's own few ulp; then one rounding to the output type.
bool close_enough(const Case& c, double got, double want, double magnitude) {
  constexpr double kEpsilon[] = {0x1p-24, 0x1p-11, 0x1p-8};
  constexpr double kBeyondF16 = 65504 * (1 - 0x1p-11);  // may round to Inf
  if (c.dtype == SPARSECOMP_F16 && std::fabs(want) > kBeyondF16 && std::isinf(got)) return got * want > 0;
  const double sums = magnitude * 0x1p-24 * (4 + std::sqrt(static_cast<double>(c.in)));
  const bool curved = c.activation > SPARSECOMP_RELU;
  const double formula = curved ? std::fabs(want) * 0x1p-20 : 0.0;
  return std::fabs(got - want) <=
         sums * (curved ? 1.13 : 1.0) + formula + std::fabs(want) * kEpsilon[c.dtype] * 1.01 + 1e-7;
}

// A product that was computed, and what it was computed from.
struct Call {
  const Case& c;
  const Weight& w;
  const float* scales;
  const void* bias;
  const Buffer &x, &y;
  const std::string& repeat;

  double scale(int64_t row) const { return scales ? static_cast<double>(scales[row]) : 1.0; }
  double added(int64_t row) const { return bias ? static_cast<double>(load_number(bias, row, c.dtype)) : 0.0; }
  double got(int64_t b, int64_t row) const {
    return static_cast<double>(load_number(y.data, b * (c.out + c.gap_y) + row, c.dtype));
  }
  bool fail(int64_t b, int64_t row, double want) const {
    CHECK(false, "%s: y[%d][%d] is %.9g, not %.9g\n  %s", c.text().c_str(), static_cast<int>(b), static_cast<int>(row),
          got(b, row), want, repeat.c_str());
    return false;
  }
};

bool is_close_row(const Call& call, int64_t b) {
  const Case& c = call.c;
  std::vector<double> column(static_cast<size_t>(c.in));
  for (int64_t k = 0; k < c.in; ++k)
    column[static_cast<size_t>(k)] = static_cast<double>(load_number(call.x.data, b * (c.in + c.gap_x) + k, c.dtype));
  for (int64_t row = 0; row < c.out; ++row) {
    double want = call.added(row), magnitude = std::fabs(want);
    const double* weights = call.w.dense.data() + row * c.in;
    for (int64_t k = 0; k < c.in; ++k) {
      const double term = call.scale(row) * weights[k] * column[static_cast<size_t>(k)];
      want += term;
      magnitude += std::fabs(term);
    }
    want = activate(want, c.activation);
    if (!close_enough(c, call.got(b, row), want, magnitude)) return call.fail(b, row, want);
  }
  return true;
}

// Sums are exact integers.
bool is_rounded_row(const Call& call, int64_t b) {
  const Case& c = call.c;
  const bool reference = std::strcmp(sparsecomp_isa(), "reference") == 0 || c.in == 0;
  const RoundedTwin x(call.x.data, b * (c.in + c.gap_x), c.in, c.dtype);
  for (int64_t row = 0; row < c.out; ++row) {
    const auto scale = static_cast<float>(call.scale(row)), added = static_cast<float>(call.added(row));
    const float product = x.product(call.w.dense.data() + row * c.in);
    if (!is_finished(static_cast<float>(call.got(b, row)), product, scale, added, c.activation, c.dtype, reference))
      return call.fail(b, row, activate(static_cast<double>(std::fma(product, scale, added)), c.activation));
  }
  return true;
}

void run_case(const Case& c, const std::string& repeat) {
  const Weight w = c.block ? random_blocks(c) : random_nm(c);
  const int size = element_bytes(c.dtype);
  const int64_t ldx = c.in + c.gap_x, ldy = c.out + c.gap_y;
  const auto extent = [&](int64_t ld, int64_t row) { return c.batch == 0 ? 0 : ((c.batch - 1) * ld + row) * size; };
  Buffer x(extent(ldx, c.in)), bias(c.out * size), y(extent(ldy, c.out));
  x.fill_numbers(c.dtype);
  bias.fill_numbers(c.dtype);
  Buffer scales(c.out * 4);
  scales.fill_numbers(SPARSECOMP_F32);
  const float* factors = c.has_scales ? reinterpret_cast<const float*>(scales.data) : nullptr;
  const sparsecomp_epilogue last{c.has_bias ? bias.data : nullptr, c.activation};
  const int code = multiply(c, w, factors, x, last, &y);
  CHECK(code == SPARSECOMP_OK, "%s: %s\n  %s", c.text().c_str(), sparsecomp_error_text(code), repeat.c_str());
  const Call call{c, w, factors, last.bias, x, y, repeat};
  for (int64_t b = 0; b < c.batch; ++b) {
    if (!(c.rounds() ? is_rounded_row(call, b) : is_close_row(call, b))) return;
    for (int64_t i = c.out * size; b + 1 < c.batch && i < ldy * size; ++i)
      CHECK(y.data[b * ldy * size + i] == 0xa5, "%s wrote between rows\n  %s", c.text().c_str(), repeat.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* error = sparsecomp_isa_error()) {
    std::printf("skipped: %s\n", error);
    return kSkipped;
  }
  int64_t count = 300, only = -1;
  uint64_t seed = 1;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if (i + 1 == argc || (option != "--count" && option != "--seed" && option != "--case")) {
      std::fprintf(stderr, "usage: %s [--count N] [--seed S] [--case I]\n", argv[0]);
      return 2;
    }
    const int64_t value = std::strtoll(argv[i + 1], nullptr, 10);
    if (option == "--count") count = value;
    if (option == "--seed") seed = static_cast<uint64_t>(value);
    if (option == "--case") only = value;
  }
  int64_t blocks = 0, rounded = 0;
  for (int64_t index = only < 0 ? 0 : only; index < (only < 0 ? count : only + 1); ++index) {
    std::seed_seq mixed{seed, static_cast<uint64_t>(index)};
    generator.seed(mixed);
    const Case c = random_case();
    blocks += c.block;
    rounded += c.rounds();
    if (only >= 0) std::printf("%s\n", c.text().c_str());
    run_case(c, "repeat: SPARSECOMP_ISA=" + std::string(sparsecomp_isa()) + " " + argv[0] + " --seed " +
                    std::to_string(seed) + " --case " + std::to_string(index));
  }
  std::printf("%s: seed %llu, %lld cases (%lld of them blocks, %lld round x), %d failures\n", sparsecomp_isa(),
              static_cast<unsigned long long>(seed), static_cast<long long>(only < 0 ? count : 1),
              static_cast<long long>(blocks), static_cast<long long>(rounded), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
