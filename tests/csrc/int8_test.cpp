// Compares products of int8 weights with activations rounded to int8, on the instruction set in use (SPARSECOMP_ISA),
// with the twin of twin.hpp: sums are integers, so that no bit of y may differ. Every buffer is exactly as large as the
// contract says, and begins anywhere.
//   cmake --workflow --preset sanitize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/bits.hpp"
#include "common/call.hpp"
#include "common/numbers.hpp"
#include "common/processor.hpp"
#include "dispatch.hpp"
#include "int8/layout.hpp"
#include "int8/linear.hpp"
#include "int8_numbers.hpp"
#include "sparsecomp.h"
#include "testing.hpp"
#include "twin.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

constexpr int kDtypes[] = {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16};

// Memory that ends where a Buffer does and begins `skew` bytes into it.
struct Skewed {
  explicit Skewed(int64_t bytes) : skew(uniform(0, 1) * uniform(1, 63)), buffer(bytes + skew) {}
  uint8_t* data() { return buffer.data + skew; }
  int64_t skew;
  Buffer buffer;
};

// A packed weight and the same dense, read from the canonical form as docs/format.md has it. Checks that the layout
// gives both back.
struct Weight {
  sparsecomp_nm shape;
  std::string name;
  std::vector<int8_t> dense;
  std::unique_ptr<Skewed> values, metadata;

  Weight(int64_t out, int64_t in, int32_t n, int32_t m, int32_t mask_rows, Weights kind)
      : shape{out, in, n, m, mask_rows, SPARSECOMP_I8_A8}, dense(static_cast<size_t>(out * in)) {
    name = std::to_string(n) + ":" + std::to_string(m) + "@v" + std::to_string(mask_rows) + " " + std::to_string(out) +
           "x" + std::to_string(in) + " weights " + std::to_string(static_cast<int>(kind));
    const int bits = position_bits(m);
    const int64_t slots = (in + m - 1) / m * n, row_bytes = (slots * bits + 7) / 8;
    Buffer kept(out * slots), positions((out + mask_rows - 1) / mask_rows * row_bytes);
    fill_positions(shape, &positions);
    for (int64_t row = 0; row < out; ++row) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        int64_t column = slot / n * m;
        for (int bit = 0; bit < bits; ++bit) {
          const int64_t at = row / mask_rows * row_bytes * 8 + slot * bits + bit;
          column += (positions.data[at / 8] >> (at % 8) & 1) << bit;
        }
        const int8_t value = column < in ? weight_at(kind, slot) : int8_t{0};
        kept.data[row * slots + slot] = static_cast<uint8_t>(value);
        if (column < in) dense[static_cast<size_t>(row * in + column)] = value;
      }
    }
    values = std::make_unique<Skewed>(sparsecomp_nm_values_bytes(&shape));
    metadata = std::make_unique<Skewed>(sparsecomp_nm_metadata_bytes(&shape));
    CHECK(sparsecomp_nm_pack(&shape, kept.data, positions.data, values->data(), metadata->data()) == SPARSECOMP_OK,
          "%s", name.c_str());
    Buffer kept_back(kept.size), positions_back(positions.size), dense_back(out * in);
    CHECK(sparsecomp_nm_unpack(&shape, values->data(), metadata->data(), kept_back.data, positions_back.data) ==
              SPARSECOMP_OK,
          "%s", name.c_str());
    CHECK(std::memcmp(kept_back.data, kept.data, static_cast<size_t>(kept.size)) == 0, "values of %s do not come back",
          name.c_str());
    // all columns are kept where N = M, and their positions are not asked for
    CHECK(n == m || std::memcmp(positions_back.data, positions.data, static_cast<size_t>(positions.size)) == 0,
          "metadata of %s does not come back", name.c_str());
    CHECK(sparsecomp_nm_to_dense(&shape, values->data(), metadata->data(), dense_back.data, 2) == SPARSECOMP_OK, "%s",
          name.c_str());
    CHECK(out * in == 0 || std::memcmp(dense_back.data, dense.data(), dense.size()) == 0, "dense form of %s",
          name.c_str());
  }

  bool is_narrow(int64_t tile) const {
    int8::Geometry g;
    CHECK(int8::make_geometry(shape, &g), "geometry");
    return int8::narrow_pairs(g, values->data(), tile);
  }
};

struct Product {
  int64_t batch;
  int dtype, activation, threads;
  bool has_bias, has_scales;
};

Product random_product(int64_t batch, int dtype) {
  const int activation = uniform(0, 1) == 1 ? static_cast<int>(uniform(SPARSECOMP_RELU, SPARSECOMP_SILU)) : 0;
  return {batch, dtype, activation, static_cast<int>(uniform(1, 3)), uniform(0, 1) == 1, uniform(0, 2) > 0};
}

// As this process would, or as on the processor that is given.
int multiply(Weight& weight, const LinearCall& call, const Processor* of) {
  const sparsecomp_nm& shape = weight.shape;
  int8::Geometry g;
  if (of && dispatch().int8 && int8::make_geometry(shape, &g))
    return int8::linear(*dispatch().isa, *dispatch().int8, g, call, *of);
  return sparsecomp_nm_linear(&shape, call.values, call.metadata, call.scales, call.dtype, call.x, call.ldx, call.batch,
                              &call.epilogue, call.y, call.ldy, call.threads);
}

// Rows of x of every kind in turn, or of one.
void compare(Weight& weight, const Product& p, const Row* only = nullptr, const Processor* of = nullptr) {
  const int64_t out = weight.shape.out_features, in = weight.shape.in_features, gap = uniform(0, 3);
  const int64_t ldx = in + gap, ldy = out + gap, first_kind = uniform(0, kRows - 1);
  const int size = element_bytes(p.dtype);
  const auto extent = [&](int64_t ld, int64_t row) { return p.batch == 0 ? 0 : ((p.batch - 1) * ld + row) * size; };
  Buffer x(extent(ldx, in)), bias(out * size), scales(out * 4), y(extent(ldy, out));
  bias.fill_numbers(p.dtype);
  scales.fill_numbers(SPARSECOMP_F32);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Row kind = only ? *only : static_cast<Row>((b + first_kind) % kRows);
    const int64_t turn = uniform(0, 1000);
    for (int64_t i = 0; i < in; ++i)
      store_number(random_number(kind, (i + turn) % in, turn, p.dtype), x.data, b * ldx + i, p.dtype);
    for (int64_t i = in; i < ldx && b + 1 < p.batch; ++i) store_number(NAN, x.data, b * ldx + i, p.dtype);
  }
  const std::string name = weight.name + " dtype " + std::to_string(p.dtype) + " batch " + std::to_string(p.batch) +
                           " activation " + std::to_string(p.activation) + " threads " + std::to_string(p.threads) +
                           (p.has_bias ? " bias" : "") + (p.has_scales ? " scales" : "");
  const auto* factors = p.has_scales ? reinterpret_cast<const float*>(scales.data) : nullptr;
  const sparsecomp_epilogue epilogue{p.has_bias ? bias.data : nullptr, p.activation};
  const LinearCall call{weight.values->data(),
                        weight.metadata->data(),
                        factors,
                        p.dtype,
                        x.data,
                        ldx,
                        p.batch,
                        epilogue,
                        y.data,
                        ldy,
                        p.threads};
  CHECK(multiply(weight, call, of) == SPARSECOMP_OK, "%s", name.c_str());
  const bool reference = std::strcmp(sparsecomp_isa(), "reference") == 0 || in == 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const RoundedTwin rounded(x.data, b * ldx, in, p.dtype);
    for (int64_t row = 0; row < out; ++row) {
      const float product = rounded.product(weight.dense.data() + row * in);
      const float got = load_number(y.data, b * ldy + row, p.dtype), scale = factors ? factors[row] : 1.0f;
      const float added = p.has_bias ? load_number(bias.data, row, p.dtype) : 0.0f;
      CHECK(is_finished(got, product, scale, added, p.activation, p.dtype, reference),
            "%s: y[%d][%d] is %.9g, of %.9g * %.9g + %.9g", name.c_str(), static_cast<int>(b), static_cast<int>(row),
            static_cast<double>(got), static_cast<double>(product), static_cast<double>(scale),
            static_cast<double>(added));
    }
    for (int64_t i = out * size; b + 1 < p.batch && i < ldy * size; ++i)
      CHECK(y.data[b * ldy * size + i] == 0xa5, "%s wrote between rows", name.c_str());
  }
}

// Every pattern, on shapes that fill tiles and steps and shapes that do not; rows that end inside a group.
void compare_patterns() {
  for (int32_t m = 2; m <= 16; m *= 2) {
    for (int32_t n = 1; n <= m; ++n) {
      for (const int64_t in : {int64_t{1}, uniform(2, 15), 16 * uniform(1, 8), uniform(17, 150)}) {
        Weight weight(uniform(0, 1) == 1 ? 32 : uniform(1, 40), in, n, m, static_cast<int32_t>(uniform(1, 4)),
                      Weights::kAny);
        compare(weight, random_product(uniform(0, 10), kDtypes[uniform(0, 2)]));
      }
    }
  }
}

// Every number of batch columns and of weights in a step.
void compare_batches() {
  constexpr int kPatterns[][2] = {{1, 16}, {1, 4}, {5, 16}, {2, 4}, {5, 8}, {12, 16}, {7, 8}, {4, 4}};
  for (const auto& pattern : kPatterns) {
    for (const Weights kind : {Weights::kSmall, Weights::kAny}) {
      Weight weight(37, uniform(90, 150), pattern[0], pattern[1], 1, kind);
      for (int64_t batch = 1; batch <= 20; ++batch)
        for (const int dtype : kDtypes) compare(weight, random_product(batch, dtype));
      compare(weight, random_product(33, SPARSECOMP_F32));
    }
    // y written by the kernels, and by what comes after them; threads with tasks of their own
    Weight whole(288, 520, pattern[0], pattern[1], 1, Weights::kSmall);
    for (const int threads : {1, 2, 5})
      compare(whole, {uniform(1, 12), SPARSECOMP_F32, SPARSECOMP_NO_ACTIVATION, threads, true, true});
    compare(whole, random_product(150, SPARSECOMP_F16));  // several tasks of a row, rounded by several threads
  }
}

// Rows that are cut in chunks, longer ones where the L1 cache is large.
void compare_chunks() {
  for (const int64_t l1_bytes : {int64_t{32} << 10, int64_t{48} << 10}) {
    const Processor of{false, l1_bytes};
    for (const int32_t n : {2, 5, 8, 12, 16}) {
      Weight weight(40, 4096 + uniform(1, 300), n, 16, 4, Weights::kAny);
      for (const int threads : {1, 2, 5}) {
        compare(weight, {uniform(9, 20), SPARSECOMP_F32, SPARSECOMP_NO_ACTIVATION, threads, true, true}, nullptr, &of);
        compare(weight, {uniform(1, 20), SPARSECOMP_BF16, SPARSECOMP_RELU, threads, false, true}, nullptr, &of);
      }
    }
  }
}

// Weights at the ends of their range, which AVX2 may add in pairs to 16 bits or must not, times activations at the ends
// of theirs: those of a row of one sign are up to 254 from its zero point.
void compare_extremes() {
  const Row kinds[] = {Row::kPositive, Row::kNegative, Row::kOnes, Row::kMinusOnes, Row::kMixed};
  for (int32_t n = 1; n <= 16; ++n) {
    for (const Weights kind : {Weights::kAny, Weights::kSmall, Weights::kLargest, Weights::kSmallest, Weights::kMixed,
                               Weights::kBeyond, Weights::kBelow}) {
      Weight weight(32, 160, n, 16, 1, kind);
      const bool of_one_value = kind == Weights::kLargest || kind == Weights::kSmallest;
      for (int64_t tile = 0; tile < 2 && n < 16; ++tile) {
        if (kind == Weights::kSmall) CHECK(weight.is_narrow(tile), "%s", weight.name.c_str());
        // two weights of a step have zeros beside them
        if (of_one_value) CHECK(weight.is_narrow(tile) == (n <= 2), "%s", weight.name.c_str());
      }
      for (const Row& row : kinds) compare(weight, {5, SPARSECOMP_F32, 0, 1, false, false}, &row);
    }
  }
}

// As many weights in a row as there may be: sums reach 65536 * 254 * 128.
void compare_longest_rows() {
  for (const Weights kind : {Weights::kLargest, Weights::kSmallest, Weights::kMixed}) {
    Weight dense(3, 1 << 16, 16, 16, 1, kind), half(3, 1 << 17, 8, 16, 1, kind);
    for (const Row& row : {Row::kOnes, Row::kMinusOnes, Row::kMixed}) {
      for (const int64_t batch : {1, 9}) {
        compare(dense, {batch, SPARSECOMP_F32, 0, 1, false, false}, &row);
        compare(half, {batch, SPARSECOMP_BF16, 0, 1, false, true}, &row);
      }
    }
  }
  for (const sparsecomp_nm& weight : {sparsecomp_nm{16, (1 << 16) + 1, 16, 16, 1, SPARSECOMP_I8_A8},
                                      sparsecomp_nm{16, (1 << 17) + 1, 1, 2, 1, SPARSECOMP_I8_A8}}) {
    CHECK(sparsecomp_nm_values_bytes(&weight) == -1, "more weights in a row than sums can hold");
    float y = 0;
    CHECK(sparsecomp_nm_linear(&weight, "", "", nullptr, SPARSECOMP_F32, "", weight.in_features, 1, nullptr, &y, 16,
                               1) == SPARSECOMP_INVALID,
          "more weights in a row than sums can hold");
  }
}

// What rounding says of itself, by a weight that gives back x: no number moves by more than half a scale, zeros stay.
void check_rounding() {
  constexpr int64_t kColumns = 16;
  const sparsecomp_nm weight{kColumns, kColumns, 1, 16, 1, SPARSECOMP_I8_A8};
  uint8_t ones[kColumns], positions[kColumns];
  for (int64_t i = 0; i < kColumns; ++i) {
    ones[i] = 1;
    positions[i] = static_cast<uint8_t>(i);
  }
  Buffer values(sparsecomp_nm_values_bytes(&weight)), metadata(sparsecomp_nm_metadata_bytes(&weight));
  sparsecomp_nm_pack(&weight, ones, positions, values.data, metadata.data);
  for (int i = 0; i < 3000; ++i) {
    float x[kColumns], y[kColumns];
    const auto kind = static_cast<Row>(i % static_cast<int>(Row::kSubnormal));
    for (int64_t k = 0; k < kColumns; ++k) x[k] = k == 3 ? 0.0f : random_number(kind, k, i, SPARSECOMP_F32);
    CHECK(sparsecomp_nm_linear(&weight, values.data, metadata.data, nullptr, SPARSECOMP_F32, x, kColumns, 1, nullptr, y,
                               kColumns, 1) == SPARSECOMP_OK,
          "rounding");
    const auto [low, high] = std::minmax_element(x, x + kColumns);
    const double scale = (static_cast<double>(*high) - static_cast<double>(*low)) / 254;
    for (int64_t k = 0; k < kColumns; ++k)
      CHECK(std::fabs(static_cast<double>(y[k]) - static_cast<double>(x[k])) <= 0.5001 * scale, "%.9g became %.9g",
            static_cast<double>(x[k]), static_cast<double>(y[k]));
    CHECK(y[3] == 0, "0 became %.9g", static_cast<double>(y[3]));
  }
}

// Bytes that are no metadata give some weight, or an error, and nothing outside the buffers is touched.
void check_damaged_metadata() {
  for (int i = 0; i < 200; ++i) {
    const auto m = static_cast<int32_t>(4 << uniform(0, 2));
    const sparsecomp_nm weight{uniform(1, 40),  uniform(1, 70), static_cast<int32_t>(uniform(1, m - 1)), m, 1,
                               SPARSECOMP_I8_A8};
    const int64_t slots = (weight.in_features + m - 1) / m * weight.n;
    Buffer kept(weight.out_features * slots), positions(weight.out_features * ((slots * position_bits(m) + 7) / 8));
    kept.fill_numbers(SPARSECOMP_I8);
    positions.fill_numbers(SPARSECOMP_I8);
    Buffer values(sparsecomp_nm_values_bytes(&weight)), metadata(sparsecomp_nm_metadata_bytes(&weight));
    Buffer x(weight.in_features * 4), y(weight.out_features * 4), dense(weight.out_features * weight.in_features);
    x.fill_numbers(SPARSECOMP_F32);
    CHECK(sparsecomp_nm_pack(&weight, kept.data, positions.data, values.data, metadata.data) == SPARSECOMP_OK, "pack");
    metadata.fill_numbers(SPARSECOMP_I8);
    CHECK(sparsecomp_nm_unpack(&weight, values.data, metadata.data, kept.data, positions.data) == SPARSECOMP_OK,
          "unpack");
    CHECK(sparsecomp_nm_to_dense(&weight, values.data, metadata.data, dense.data, 1) == SPARSECOMP_OK, "dense");
    CHECK(sparsecomp_nm_linear(&weight, values.data, metadata.data, nullptr, SPARSECOMP_F32, x.data, weight.in_features,
                               1, nullptr, y.data, weight.out_features, 1) == SPARSECOMP_OK,
          "product");
  }
}

void check_empty() {
  for (const int dtype : kDtypes) {
    for (int activation = SPARSECOMP_NO_ACTIVATION; activation <= SPARSECOMP_SILU; ++activation) {
      Weight no_columns(21, 0, 2, 4, 1, Weights::kAny);  // y = activation(bias)
      compare(no_columns, {3, dtype, activation, 2, true, true});
      compare(no_columns, {3, dtype, activation, 2, false, false});
    }
    Weight no_rows(0, 21, 16, 16, 1, Weights::kAny), some(21, 21, 8, 16, 1, Weights::kAny);
    compare(no_rows, {3, dtype, 0, 1, true, true});
    compare(some, {0, dtype, 0, 1, true, true});
  }
}

void check_refusals() {
  const sparsecomp_nm good{4, 16, 8, 16, 1, SPARSECOMP_I8_A8}, dense{4, 16, 16, 16, 1, SPARSECOMP_I8_A8};
  for (const sparsecomp_nm& bad :
       {sparsecomp_nm{4, 16, 5, 4, 1, SPARSECOMP_I8_A8}, sparsecomp_nm{4, 16, 0, 4, 1, SPARSECOMP_I8_A8},
        sparsecomp_nm{4, 16, 2, 3, 1, SPARSECOMP_I8_A8}, sparsecomp_nm{-1, 16, 2, 4, 1, SPARSECOMP_I8_A8},
        sparsecomp_nm{4, -1, 2, 4, 1, SPARSECOMP_I8_A8}, sparsecomp_nm{4, 16, 2, 4, 0, SPARSECOMP_I8_A8}}) {
    CHECK(sparsecomp_nm_values_bytes(&bad) == -1 && sparsecomp_nm_metadata_bytes(&bad) == -1, "no size");
    CHECK(sparsecomp_nm_linear(&bad, "", "", nullptr, SPARSECOMP_F32, "", 16, 1, nullptr, &failures, 4, 1) ==
              SPARSECOMP_INVALID,
          "refused");
  }
  Buffer values(sparsecomp_nm_values_bytes(&dense)), y(16);
  std::memset(values.data, 0, static_cast<size_t>(values.size));
  const float x[16] = {};
  const auto run = [&](const sparsecomp_nm& weight, const void* metadata, int32_t dtype, int64_t ldx,
                       int32_t activation) {
    const sparsecomp_epilogue epilogue{nullptr, activation};
    return sparsecomp_nm_linear(&weight, values.data, metadata, nullptr, dtype, x, ldx, ldx < 16 ? 2 : 1, &epilogue,
                                y.data, 4, 1);
  };
  CHECK(run(dense, nullptr, SPARSECOMP_F32, 16, 0) == SPARSECOMP_OK, "no metadata where all columns are kept");
  CHECK(run(good, nullptr, SPARSECOMP_F32, 16, 0) == SPARSECOMP_INVALID, "no metadata");
  CHECK(run(dense, nullptr, SPARSECOMP_F32, 15, 0) == SPARSECOMP_INVALID, "short ldx");
  CHECK(run(dense, nullptr, SPARSECOMP_F32, 16, SPARSECOMP_SILU + 1) == SPARSECOMP_INVALID, "activation");
  for (const int32_t dtype : {int32_t{SPARSECOMP_I8}, int32_t{SPARSECOMP_I8_A8}, -1, 9})
    CHECK(run(dense, nullptr, dtype, 16, 0) == SPARSECOMP_UNSUPPORTED, "x of dtype %d", dtype);
}

}  // namespace

int main() {
  if (const char* error = sparsecomp_isa_error()) {
    std::printf("skipped: %s\n", error);
    return kSkipped;
  }
  check_refusals();
  check_empty();
  check_rounding();
  check_damaged_metadata();
  compare_patterns();
  compare_batches();
  compare_chunks();
  compare_extremes();
  compare_longest_rows();
  std::printf("%s: %d failures\n", sparsecomp_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
