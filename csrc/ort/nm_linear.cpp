#include "nm_linear.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace sparsecomp::ort {
namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest vector register
// The kernels work in tiles of 16 rows, and rearrange x once per call: fewer rows than this do not pay for it.
constexpr int64_t kTileRows = 16;
constexpr int64_t kLeastRows = 64;
constexpr int64_t kLeastBatch = 64;

std::atomic<int64_t> run_count{0};

void check(int code) {
  if (code != SPARSECOMP_OK)
    throw std::runtime_error(std::string("sparsecomp::NMLinear: ") + sparsecomp_error_text(code));
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("sparsecomp::NMLinear: " + message);
}

int32_t narrow(int64_t value, const char* name) {
  require(value == static_cast<int32_t>(value), std::string("attribute ") + name + " is out of range");
  return static_cast<int32_t>(value);
}

std::string text(const std::vector<int64_t>& shape) {
  std::string joined = "[";
  for (size_t i = 0; i < shape.size(); ++i) joined += (i ? ", " : "") + std::to_string(shape[i]);
  return joined + "]";
}

}  // namespace

int64_t runs() { return run_count.load(std::memory_order_relaxed); }

void NMLinear::Free::operator()(void* pointer) const { std::free(pointer); }

NMLinear::Buffer NMLinear::allocate(int64_t bytes) {
  // aligned_alloc wants a multiple of the alignment
  const size_t rounded = (static_cast<size_t>(bytes) / kAlignment + 1) * kAlignment;
  Buffer buffer(std::aligned_alloc(kAlignment, rounded));
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

NMLinear::NMLinear(const Api& api, const OrtKernelInfo* info, const Inputs& inputs, int32_t dtype, int32_t activation)
    : api_(api), inputs_(inputs), dtype_(dtype), activation_(activation) {
  const OrtValue* values = api_.constant_input(info, kValues);
  const OrtValue* metadata = inputs_.metadata ? api_.constant_input(info, inputs_.metadata) : nullptr;
  require(values && (metadata || !inputs_.metadata), "values and metadata must be initialisers of the model");
  const std::vector<int64_t> values_shape = api_.shape(values);
  require(values_shape.size() == 2, "values must be a matrix");
  describe(info, values_shape);
  const std::vector<int64_t> want_values = {weight_.out_features, slots()};
  require(values_shape == want_values, "values have shape " + text(values_shape) + ", expected " + text(want_values));
  if (metadata) tile_metadata_bytes_ = check_metadata(info, metadata);
  if (inputs_.scales) read_scales(info);

  row_values_bytes_ = slots() * (inputs_.scales ? 1 : dtype == SPARSECOMP_F32 ? 4 : 2);
  cores_ = std::max(1u, std::thread::hardware_concurrency());
  const int64_t unit = std::lcm(kTileRows, int64_t{weight_.mask_rows});
  const int64_t even = (weight_.out_features + cores_ - 1) / cores_;
  const int64_t rows = (std::max(even, kLeastRows) + unit - 1) / unit * unit;
  const auto* values_data = static_cast<const uint8_t*>(api_.data(values));
  const auto* metadata_data = metadata ? static_cast<const uint8_t*>(api_.data(metadata)) : nullptr;
  for (int64_t row = 0; row < weight_.out_features; row += rows) {
    add_slice(row, std::min(rows, weight_.out_features - row), values_data, metadata_data);
  }
}

void NMLinear::describe(const OrtKernelInfo* info, const std::vector<int64_t>& values_shape) {
  weight_.out_features = values_shape[0];
  weight_.in_features = api_.attribute(info, "in_features");
  weight_.m = narrow(api_.attribute(info, "m"), "m");
  weight_.n = inputs_.metadata ? narrow(api_.attribute(info, "n"), "n") : weight_.m;
  weight_.mask_rows = inputs_.metadata ? narrow(api_.attribute(info, "mask_rows"), "mask_rows") : 1;
  weight_.dtype = inputs_.scales ? int32_t{SPARSECOMP_I8_A8} : dtype_;
  require(sparsecomp_nm_values_bytes(&weight_) >= 0, "the attributes describe no N:M weight");
}

int64_t NMLinear::check_metadata(const OrtKernelInfo* info, const OrtValue* metadata) const {
  const std::vector<int64_t> shape = api_.shape(metadata);
  require(shape.size() == 2, "metadata must be a matrix");
  const int64_t index_bits = api_.attribute(info, "index_bits");
  require(index_bits > 0 && index_bits <= 4 && int64_t{1} << index_bits == weight_.m, "index_bits does not fit m");
  const std::vector<int64_t> want = {(weight_.out_features + weight_.mask_rows - 1) / weight_.mask_rows,
                                     (slots() * index_bits + 7) / 8};
  require(shape == want, "metadata has shape " + text(shape) + ", expected " + text(want));
  return want[1];
}

void NMLinear::read_scales(const OrtKernelInfo* info) {
  const OrtValue* scales = api_.constant_input(info, inputs_.scales);
  require(scales != nullptr, "scales must be an initialiser of the model");
  const std::vector<int64_t> shape = api_.shape(scales), want = {weight_.out_features};
  require(shape == want, "scales have shape " + text(shape) + ", expected " + text(want));
  const auto* data = static_cast<const float*>(api_.data(scales));
  scales_.assign(data, data + weight_.out_features);
}

void NMLinear::add_slice(int64_t first_row, int64_t rows, const uint8_t* values, const uint8_t* metadata) {
  Slice slice{weight_, first_row, nullptr, nullptr};
  slice.weight.out_features = rows;
  slice.values = allocate(sparsecomp_nm_values_bytes(&slice.weight));
  slice.metadata = allocate(sparsecomp_nm_metadata_bytes(&slice.weight));
  const uint8_t* positions = metadata ? metadata + first_row / weight_.mask_rows * tile_metadata_bytes_ : nullptr;
  check(sparsecomp_nm_pack(&slice.weight, values + first_row * row_values_bytes_, positions, slice.values.get(),
                           slice.metadata.get()));
  slices_.push_back(std::move(slice));
}

void NMLinear::compute(OrtKernelContext* context) const {
  const OrtValue* x = api_.input(context, kX);
  const OrtValue* bias = api_.input(context, inputs_.bias);
  std::vector<int64_t> shape = api_.shape(x);
  require(!shape.empty() && shape.back() == weight_.in_features,
          "x has shape " + text(shape) + "; its last dimension must be " + std::to_string(weight_.in_features));
  const std::vector<int64_t> bias_shape = api_.shape(bias);
  require(bias_shape.size() == 1 && bias_shape[0] == weight_.out_features,
          "bias has shape " + text(bias_shape) + ", expected [" + std::to_string(weight_.out_features) + "]");
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) batch *= shape[i];
  shape.back() = weight_.out_features;
  OrtValue* y = api_.output(context, 0, shape);
  run_count.fetch_add(1, std::memory_order_relaxed);
  if (batch == 0 || slices_.empty()) return;

  // a weight of few slices leaves cores idle, so a large batch is cut as well
  const int64_t slices = static_cast<int64_t>(slices_.size());
  const int64_t chunks = std::clamp<int64_t>(cores_ / slices, 1, std::max<int64_t>(1, batch / kLeastBatch));
  struct Run {
    const NMLinear* self;
    const uint8_t *x, *bias;
    uint8_t* y;
    int64_t batch, chunks, element_bytes;
    std::atomic<int> error;
  } run{this,
        static_cast<const uint8_t*>(api_.data(x)),
        static_cast<const uint8_t*>(api_.data(bias)),
        static_cast<uint8_t*>(api_.data(y)),
        batch,
        chunks,
        dtype_ == SPARSECOMP_F32 ? 4 : 2,
        SPARSECOMP_OK};
  const auto task = [](void* data, size_t index) {
    Run& r = *static_cast<Run*>(data);
    const Slice& slice = r.self->slices_[index / static_cast<size_t>(r.chunks)];
    const int64_t chunk = static_cast<int64_t>(index) % r.chunks;
    const int64_t first = r.batch * chunk / r.chunks, last = r.batch * (chunk + 1) / r.chunks;
    const int64_t in = r.self->weight_.in_features, out = r.self->weight_.out_features;
    const sparsecomp_epilogue epilogue = {r.bias + slice.first_row * r.element_bytes, r.self->activation_};
    const float* scales = r.self->scales_.empty() ? nullptr : r.self->scales_.data() + slice.first_row;
    const int code = sparsecomp_nm_linear(&slice.weight, slice.values.get(), slice.metadata.get(), scales,
                                          r.self->dtype_, r.x + first * in * r.element_bytes, in, last - first,
                                          &epilogue, r.y + (first * out + slice.first_row) * r.element_bytes, out, 1);
    if (code != SPARSECOMP_OK) r.error = code;
  };
  if (slices * chunks == 1) {
    task(&run, 0);
  } else {
    api_.parallel_for(context, task, static_cast<size_t>(slices * chunks), &run);
  }
  check(run.error);
}

}  // namespace sparsecomp::ort
