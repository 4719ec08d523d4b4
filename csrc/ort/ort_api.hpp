// The few parts of ONNX Runtime's C API that the operator library uses, without its headers.
//
// OrtApi is a table of function pointers to which new versions only append, so a slot number never changes its meaning.
// tests/onnx/test_ort_library.py runs every slot against the installed runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Version 9 of the structure: later versions append optional members, and the runtime reads no further than `version`
// says.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
};
}

namespace sparsecomp::ort {

// Of the structure OrtCustomOp, and of the table of functions: 17 (runtime 1.17) brought KernelContext_ParallelFor.
constexpr uint32_t kCustomOpVersion = 9;
constexpr uint32_t kApiVersion = 17;
constexpr int kRequired = 0;  // OrtCustomOpInputOutputCharacteristic

// ONNXTensorElementDataType
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kBfloat16 = 16 };

class Api {
 public:
  explicit Api(const OrtApi* table) : slots_(reinterpret_cast<void* const*>(table)) {}

  OrtCustomOpDomain* create_domain(const char* name) const {
    OrtCustomOpDomain* domain = nullptr;
    check(call<26>(name, &domain));
    return domain;
  }
  void add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const { check(call<27>(domain, op)); }
  void add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const { check(call<28>(options, domain)); }

  int64_t attribute(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    check(call<86>(info, name, &value));
    return value;
  }

  // The constant behind an input, or nullptr if it is computed at run time.
  const OrtValue* constant_input(const OrtKernelInfo* info, size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(call<249>(info, index, &is_constant, &value));
    return is_constant ? value : nullptr;
  }

  const OrtValue* input(OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    check(call<90>(static_cast<const OrtKernelContext*>(context), index, &value));
    return value;
  }

  OrtValue* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape) const {
    OrtValue* value = nullptr;
    check(call<91>(context, index, shape.data(), shape.size(), &value));
    return value;
  }

  void* data(const OrtValue* value) const {
    void* pointer = nullptr;
    check(call<51>(const_cast<OrtValue*>(value), &pointer));
    return pointer;
  }

  std::vector<int64_t> shape(const OrtValue* value) const {
    const Shape info = shape_info(value);
    size_t rank = 0;
    check(call<61>(static_cast<const OrtTensorTypeAndShapeInfo*>(info.get()), &rank));
    std::vector<int64_t> dimensions(rank);
    check(call<62>(static_cast<const OrtTensorTypeAndShapeInfo*>(info.get()), dimensions.data(), rank));
    return dimensions;
  }

  // function(data, i) for each i < count, on the threads of the session; `function` must not throw.
  void parallel_for(OrtKernelContext* context, void (*function)(void*, size_t), size_t count, void* data) const {
    constexpr size_t kOnePerThread = 0;
    check(call<274>(static_cast<const OrtKernelContext*>(context), function, count, kOnePerThread, data));
  }

  OrtStatus* make_status(const char* message) const {
    constexpr int kFail = 1;
    return reinterpret_cast<OrtStatus* (*)(int, const char*)>(slots_[0])(kFail, message);
  }

 private:
  struct ReleaseShape {
    void* const* slots;
    void operator()(OrtTensorTypeAndShapeInfo* info) const {
      reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(slots[99])(info);
    }
  };
  using Shape = std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseShape>;

  Shape shape_info(const OrtValue* value) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(call<65>(value, &info));
    return Shape(info, ReleaseShape{slots_});
  }

  template <size_t Slot, class... Arguments>
  OrtStatus* call(Arguments... arguments) const {
    return reinterpret_cast<OrtStatus* (*)(Arguments...)>(slots_[Slot])(arguments...);
  }

  // A structure of version 9 reports no status from a kernel; the runtime turns exceptions into one.
  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = reinterpret_cast<const char* (*)(const OrtStatus*)>(slots_[2])(status);
    reinterpret_cast<void (*)(OrtStatus*)>(slots_[93])(status);
    throw std::runtime_error("sparsecomp: " + message);
  }

  void* const* slots_;
};

}  // namespace sparsecomp::ort
