// Entry points of the operator library: ONNX Runtime calls RegisterCustomOps for every session that registers it.
#include <stdexcept>
#include <vector>

#include "nm_linear.hpp"
#include "ort_api.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using sparsecomp::ort::Api;
using sparsecomp::ort::NMLinear;

// The names are those of sparsecomp/onnx/function.py.
struct Variant {
  const char* name;
  sparsecomp::ort::Inputs inputs;
  int32_t activation;
};
using sparsecomp::ort::kDenseIntegers;
using sparsecomp::ort::kFloats;
using sparsecomp::ort::kIntegers;
constexpr Variant kVariants[] = {{"NMLinear", kFloats, SPARSECOMP_NO_ACTIVATION},
                                 {"NMLinearRelu", kFloats, SPARSECOMP_RELU},
                                 {"NMLinearGelu", kFloats, SPARSECOMP_GELU},
                                 {"NMLinearGeluTanh", kFloats, SPARSECOMP_GELU_TANH},
                                 {"NMLinearSilu", kFloats, SPARSECOMP_SILU},
                                 {"NMLinearInt8", kIntegers, SPARSECOMP_NO_ACTIVATION},
                                 {"NMLinearInt8Relu", kIntegers, SPARSECOMP_RELU},
                                 {"NMLinearInt8Gelu", kIntegers, SPARSECOMP_GELU},
                                 {"NMLinearInt8GeluTanh", kIntegers, SPARSECOMP_GELU_TANH},
                                 {"NMLinearInt8Silu", kIntegers, SPARSECOMP_SILU},
                                 {"LinearInt8", kDenseIntegers, SPARSECOMP_NO_ACTIVATION},
                                 {"LinearInt8Relu", kDenseIntegers, SPARSECOMP_RELU},
                                 {"LinearInt8Gelu", kDenseIntegers, SPARSECOMP_GELU},
                                 {"LinearInt8GeluTanh", kDenseIntegers, SPARSECOMP_GELU_TANH},
                                 {"LinearInt8Silu", kDenseIntegers, SPARSECOMP_SILU}};

// One operator for one element type, as the runtime sees it; C functions find their data behind the structure.
struct Op : OrtCustomOp {
  Variant variant;
  int element_type;
  int32_t dtype;

  Op(const Variant& one, int onnx_type, int32_t number_type)
      : OrtCustomOp{}, variant(one), element_type(onnx_type), dtype(number_type) {
    version = sparsecomp::ort::kCustomOpVersion;
    CreateKernel = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info) -> void* {
      const Op* self = static_cast<const Op*>(op);
      return new NMLinear(Api(api), info, self->variant.inputs, self->dtype, self->variant.activation);
    };
    GetName = [](const OrtCustomOp* op) { return static_cast<const Op*>(op)->variant.name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputType = [](const OrtCustomOp* op, size_t index) -> int {
      const Op* self = static_cast<const Op*>(op);
      const sparsecomp::ort::Inputs& inputs = self->variant.inputs;
      if (index == sparsecomp::ort::kValues && inputs.scales) return sparsecomp::ort::kInt8;
      if (index != 0 && index == inputs.metadata) return sparsecomp::ort::kUint8;
      if (index != 0 && index == inputs.scales) return sparsecomp::ort::kFloat;
      return self->element_type;
    };
    GetInputTypeCount = [](const OrtCustomOp* op) -> size_t {
      return static_cast<const Op*>(op)->variant.inputs.count();
    };
    GetOutputType = [](const OrtCustomOp* op, size_t) -> int { return static_cast<const Op*>(op)->element_type; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    KernelCompute = [](void* kernel, OrtKernelContext* context) { static_cast<NMLinear*>(kernel)->compute(context); };
    KernelDestroy = [](void* kernel) { delete static_cast<NMLinear*>(kernel); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return sparsecomp::ort::kRequired; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return sparsecomp::ort::kRequired; };
  }
};

// Sessions keep pointers to the operators and their domain and tell nobody when they end, so there is one set for all.
OrtCustomOpDomain* shared_domain(const Api& api) {
  static const std::vector<Op> ops = [] {
    std::vector<Op> made;
    for (const Variant& variant : kVariants) {
      made.emplace_back(variant, sparsecomp::ort::kFloat, SPARSECOMP_F32);
      made.emplace_back(variant, sparsecomp::ort::kFloat16, SPARSECOMP_F16);
      made.emplace_back(variant, sparsecomp::ort::kBfloat16, SPARSECOMP_BF16);
    }
    return made;
  }();
  static OrtCustomOpDomain* const domain = [&api] {
    OrtCustomOpDomain* made = api.create_domain("sparsecomp");
    for (const Op& op : ops) api.add_op(made, &op);
    return made;
  }();
  return domain;
}

}  // namespace

EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* table = base->GetApi(sparsecomp::ort::kApiVersion);
  if (!table) {
    // a status cannot be made without a table; version 1 has the same slots
    const OrtApi* oldest = base->GetApi(1);
    return oldest ? Api(oldest).make_status("sparsecomp needs ONNX Runtime 1.17 or newer") : nullptr;
  }
  const Api api(table);
  try {
    api.add_domain(options, shared_domain(api));
  } catch (const std::exception& error) {
    return api.make_status(error.what());
  }
  return nullptr;
}

// For tests: how often the kernel ran in this process.
EXPORT int64_t sparsecomp_ort_runs() { return sparsecomp::ort::runs(); }
