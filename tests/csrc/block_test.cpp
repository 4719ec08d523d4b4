// Compares the block-sparse kernels of the instruction set in use (SPARSECOMP_ISA) with the scalar reference, on block
// sizes that fill vectors and sizes that do not, with every buffer exactly as large as the contract says.
//   cmake --workflow --preset sanitize
#include <cmath>
#include <string>
#include <vector>

#include "block/layout.hpp"
#include "block/reference.hpp"
#include "sparsecomp.h"
#include "testing.hpp"

namespace {

using namespace sparsecomp;
using namespace sparsecomp::testing;

void compare_with_reference(int64_t out, int64_t in, int rows, int cols, int dtype, double density, int64_t batch,
                            int threads, bool has_bias) {
  const int64_t down = (out + rows - 1) / rows, across = (in + cols - 1) / cols, bitmap_bytes = (across + 7) / 8;
  Buffer bitmap(down * bitmap_bytes);
  std::memset(bitmap.data, 0, static_cast<size_t>(bitmap.size));
  int64_t kept = 0;
  for (int64_t block = 0; block < down * across; ++block) {
    if (static_cast<double>(uniform(0, 999)) >= density * 1000) continue;
    bitmap.data[block / across * bitmap_bytes + block % across / 8] |= 1 << (block % across % 8);
    ++kept;
  }
  const sparsecomp_block weight{out, in, rows, cols, kept, dtype};
  BlockGeometry g;
  CHECK(make_block_geometry(weight, &g), "geometry");
  const int size = element_bytes(dtype);
  const std::string name = std::to_string(out) + "x" + std::to_string(in) + " block " + std::to_string(rows) + "x" +
                           std::to_string(cols) + " kept " + std::to_string(kept) + " dtype " + std::to_string(dtype) +
                           " batch " + std::to_string(batch) + " threads " + std::to_string(threads);

  Buffer canonical(kept * rows * cols * size);
  canonical.fill_numbers(dtype);
  Buffer values(sparsecomp_block_values_bytes(&weight)), metadata(sparsecomp_block_metadata_bytes(&weight));
  CHECK(sparsecomp_block_pack(&weight, canonical.data, bitmap.data, values.data, metadata.data) == SPARSECOMP_OK, "%s",
        name.c_str());
  Buffer back(canonical.size), back_bitmap(bitmap.size);
  CHECK(sparsecomp_block_unpack(&weight, values.data, metadata.data, back.data, back_bitmap.data) == SPARSECOMP_OK,
        "%s", name.c_str());
  CHECK(std::memcmp(back.data, canonical.data, static_cast<size_t>(back.size)) == 0, "values of %s do not come back",
        name.c_str());
  CHECK(std::memcmp(back_bitmap.data, bitmap.data, static_cast<size_t>(bitmap.size)) == 0,
        "bitmap of %s does not come back", name.c_str());

  const int64_t ldx = in + 2, ldy = out + 3;
  const auto extent = [&](int64_t ld, int64_t row) { return batch == 0 ? 0 : ((batch - 1) * ld + row) * size; };
  Buffer x(extent(ldx, in)), bias(out * size), y(extent(ldy, out)), want(extent(ldy, out)), dense(out * in * size);
  x.fill_numbers(dtype);
  bias.fill_numbers(dtype);
  Buffer scales(out * 4);
  scales.fill_numbers(SPARSECOMP_F32);
  const bool has_scales = uniform(0, 1) == 1;
  const float* factors = has_scales ? reinterpret_cast<const float*>(scales.data) : nullptr;
  const sparsecomp_epilogue epilogue{has_bias ? bias.data : nullptr,
                                     static_cast<int32_t>(uniform(SPARSECOMP_NO_ACTIVATION, SPARSECOMP_SILU))};
  const LinearCall call{values.data, metadata.data, factors, dtype, x.data, ldx, batch, epilogue, want.data, ldy, 1};
  CHECK(sparsecomp_block_linear(&weight, values.data, metadata.data, factors, dtype, x.data, ldx, batch, &epilogue,
                                y.data, ldy, threads) == SPARSECOMP_OK,
        "%s", name.c_str());
  CHECK(block_reference(g, call) == SPARSECOMP_OK, "%s", name.c_str());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0; row < out; ++row) {
      const float got = load_number(y.data, b * ldy + row, dtype);
      const float expected = load_number(want.data, b * ldy + row, dtype);
      const float unit = dtype == SPARSECOMP_F32 ? 1e-5f : dtype == SPARSECOMP_F16 ? 2e-3f : 1.6e-2f;
      const float factor = has_scales ? std::fabs(factors[row]) : 1.0f;
      const float scale = std::fabs(expected) + factor * std::sqrt(static_cast<float>(in) + 1) + 1;
      CHECK(std::fabs(got - expected) <= unit * scale, "%s: y[%d][%d] is %g, not %g", name.c_str(), static_cast<int>(b),
            static_cast<int>(row), static_cast<double>(got), static_cast<double>(expected));
    }
    for (int64_t i = out * size; b + 1 < batch && i < ldy * size; ++i)
      CHECK(y.data[b * ldy * size + i] == 0xa5, "%s wrote between rows", name.c_str());
  }
  CHECK(sparsecomp_block_to_dense(&weight, values.data, metadata.data, dense.data, threads) == SPARSECOMP_OK, "%s",
        name.c_str());
  int64_t nonzeros = 0;
  for (int64_t i = 0; i < out * in; ++i) nonzeros += load_number(dense.data, i, dtype) != 0;
  CHECK(nonzeros <= kept * rows * cols, "dense form of %s", name.c_str());
}

void compare_random(int count) {
  constexpr int kSides[][2] = {{16, 16}, {4, 4},  {16, 1}, {1, 16}, {32, 32}, {8, 8},  {2, 8},
                               {8, 2},   {64, 3}, {3, 5},  {5, 17}, {1, 1},   {24, 10}};
  for (int i = 0; i < count; ++i) {
    const auto& side = kSides[i % 13];
    const int64_t batch = i % 10 == 0 ? uniform(190, 210) : uniform(0, 30);
    compare_with_reference(uniform(0, 90), uniform(0, 130), side[0], side[1],
                           static_cast<int>(uniform(SPARSECOMP_F32, SPARSECOMP_BF16)),
                           static_cast<double>(uniform(0, 4)) / 4, batch, static_cast<int>(uniform(1, 3)), i % 2 == 0);
  }
  // enough weights for several groups of block rows and several threads
  compare_with_reference(256, 1024, 16, 16, SPARSECOMP_F32, 0.8, 30, 3, true);
  compare_with_reference(512, 512, 4, 4, SPARSECOMP_BF16, 0.5, 230, 3, true);
}

// Inf in a column of no kept block must not be seen, nor what lies beside a block that is padded.
void check_unnamed_columns() {
  for (int32_t dtype : {SPARSECOMP_F32, SPARSECOMP_F16, SPARSECOMP_BF16}) {
    const sparsecomp_block weight{3, 12, 3, 3, 1, dtype};
    const int size = element_bytes(dtype);
    const uint8_t bitmap[] = {1 << 2};
    Buffer canonical(9 * size), values(sparsecomp_block_values_bytes(&weight));
    Buffer metadata(sparsecomp_block_metadata_bytes(&weight)), x(2 * 12 * size), y(2 * 3 * size);
    for (int64_t i = 0; i < 9; ++i) store_number(1, canonical.data, i, dtype);
    for (int64_t k = 0; k < 24; ++k) store_number(k % 12 / 3 == 2 ? 1.0f : INFINITY, x.data, k, dtype);
    sparsecomp_block_pack(&weight, canonical.data, bitmap, values.data, metadata.data);
    CHECK(sparsecomp_block_linear(&weight, values.data, metadata.data, nullptr, dtype, x.data, 12, 2, nullptr, y.data,
                                  3, 1) == SPARSECOMP_OK,
          "dtype %d", dtype);
    for (int64_t i = 0; i < 6; ++i) CHECK(load_number(y.data, i, dtype) == 3, "dtype %d", dtype);
  }
}

void check_refusals() {
  const sparsecomp_block good{8, 8, 4, 4, 2, SPARSECOMP_F32};
  for (sparsecomp_block bad :
       {sparsecomp_block{8, 8, 0, 4, 2, SPARSECOMP_F32}, sparsecomp_block{8, 8, 4, 4, 5, SPARSECOMP_F32},
        sparsecomp_block{8, 8, 4, 4, -1, SPARSECOMP_F32}, sparsecomp_block{-8, 8, 4, 4, 0, SPARSECOMP_F32},
        sparsecomp_block{8, 8, 4, 4, 2, 9}}) {
    CHECK(sparsecomp_block_values_bytes(&bad) == -1, "a bad description has no size");
    CHECK(sparsecomp_block_linear(&bad, "", "", nullptr, SPARSECOMP_F32, "", 8, 1, nullptr, &bad, 8, 1) ==
              SPARSECOMP_INVALID,
          "refused");
  }
  const int32_t most = 0x7fffffff;
  const sparsecomp_block huge{most, most, most, most, 1, SPARSECOMP_F32};
  CHECK(sparsecomp_block_values_bytes(&huge) == -1, "its bytes do not fit");

  Buffer canonical(32 * 4), values(sparsecomp_block_values_bytes(&good));
  Buffer metadata(sparsecomp_block_metadata_bytes(&good)), x(8 * 4), y(8 * 4);
  canonical.fill_numbers(SPARSECOMP_F32);
  x.fill_numbers(SPARSECOMP_F32);
  const uint8_t bitmap[] = {1, 2}, one[] = {1, 0}, outside[] = {1, 4};
  const auto pack = [&](const uint8_t* bits) {
    return sparsecomp_block_pack(&good, canonical.data, bits, values.data, metadata.data);
  };
  const auto run = [&] {
    return sparsecomp_block_linear(&good, values.data, metadata.data, nullptr, SPARSECOMP_F32, x.data, 8, 1, nullptr,
                                   y.data, 8, 1);
  };
  CHECK(pack(one) == SPARSECOMP_INVALID, "fewer blocks than said");
  CHECK(pack(outside) == SPARSECOMP_INVALID, "a block outside the grid");
  CHECK(pack(bitmap) == SPARSECOMP_OK && run() == SPARSECOMP_OK, "intact");
  for (int64_t byte = 0; byte < metadata.size; ++byte) {
    // damage is refused, or (a bit of the bitmap moved within its row) multiplies other columns: nothing else is read
    for (int bit = 0; bit < 8; ++bit) {
      metadata.data[byte] ^= 1 << bit;
      CHECK(run() == SPARSECOMP_INVALID, "byte %d bit %d", static_cast<int>(byte), bit);
      metadata.data[byte] ^= 1 << bit;
    }
  }
  const sparsecomp_block bytes{8, 8, 4, 4, 2, SPARSECOMP_I8};
  CHECK(sparsecomp_block_linear(&bytes, "", "", nullptr, SPARSECOMP_F32, "", 8, 1, nullptr, y.data, 8, 1) ==
            SPARSECOMP_UNSUPPORTED,
        "int8");
  CHECK(sparsecomp_block_linear(&good, values.data, metadata.data, nullptr, SPARSECOMP_BF16, x.data, 8, 1, nullptr,
                                y.data, 8, 1) == SPARSECOMP_UNSUPPORTED,
        "x of another type");
  const sparsecomp_epilogue unknown{nullptr, SPARSECOMP_SILU + 1};
  CHECK(sparsecomp_block_linear(&good, values.data, metadata.data, nullptr, SPARSECOMP_F32, x.data, 8, 1, &unknown,
                                y.data, 8, 1) == SPARSECOMP_INVALID,
        "activation");
  CHECK(sparsecomp_block_linear(&good, values.data, metadata.data, nullptr, SPARSECOMP_F32, x.data, 7, 2, nullptr,
                                y.data, 8, 1) == SPARSECOMP_INVALID,
        "short ldx");
  CHECK(sparsecomp_block_linear(&good, nullptr, nullptr, nullptr, SPARSECOMP_F32, x.data, 8, 1, nullptr, y.data, 8,
                                1) == SPARSECOMP_INVALID,
        "null weight");
}

}  // namespace

int main() {
  if (const char* error = sparsecomp_isa_error()) {
    std::printf("skipped: %s\n", error);
    return kSkipped;
  }
  check_refusals();
  check_unnamed_columns();
  compare_random(520);
  std::printf("%s: %d failures\n", sparsecomp_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
