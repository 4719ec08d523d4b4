// y = activation(x W^T + b) for a 2:4 weight on sm_90, through CUTLASS's wgmma.sp collective (CUTLASS 4.2).
//
// The sparse operand of wgmma.sp is the left one, so the kernel computes Y^T = W X^T: CUTLASS's rows are outputs, its
// columns tokens, and its column-major result is y row by row. One configuration is compiled at a time; the macros
// below come from sparsecomp/backends/gpu/cutlass/build.py.
//
// CUTLASS's own can_implement() is not asked: it wants every side to be a multiple of 16 bytes. The tensor copy engine
// needs that of strides and base addresses only, which check() looks at; what lies beyond a side is read as zeros and
// never written.
#include "wgmma_sp.h"

#include <cuda_runtime.h>

#include "activation.cuh"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace sparsecomp {
namespace {

using namespace cute;

using Element = SC_ELEMENT;  // of the weight and of x
using Output = SC_OUTPUT;    // of y and the bias

constexpr int kDepth = 128;  // columns of a step; the metadata layout depends on it
constexpr int kInputAlignment = 128 / cutlass::sizeof_bits<Element>::value;
constexpr int kOutputAlignment = 128 / cutlass::sizeof_bits<Output>::value;

using Tile = Shape<Int<SC_TILE_OUT>, Int<SC_TILE_TOKENS>, Int<kDepth>>;
using Cluster = Shape<Int<SC_CLUSTER_OUT>, Int<SC_CLUSTER_TOKENS>, _1>;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

#if SC_PINGPONG
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
#if SC_FAST_ACCUMULATION
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;
#else
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
#endif
#else
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#if SC_FAST_ACCUMULATION
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
#else
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
#endif
#endif

namespace fusion = cutlass::epilogue::fusion;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

#if SC_SCALED
// activation(row scale * (token scale * accumulator) + bias); a scale may be one number for all
using RowScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<bool, _0, int64_t>, 1>;
using TokenScale = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, bool, int64_t>, 1>;
using Bias = fusion::Sm90ColBroadcast<0, Tile, Output, float, Stride<_1, _0, int64_t>, 1>;
using Scaled =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>, TokenScale, fusion::Sm90AccFetch>;
using Shifted = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::homogeneous_multiply_add, float, float, kRound>, RowScale,
                                Scaled, Bias>;
using Fusion = fusion::Sm90EVT<fusion::Sm90Compute<ActivationFunction, Output, float, kRound>, Shifted>;
#else
using Fusion = fusion::LinCombPerRowBiasEltAct<ActivationFunction, Output, float, Output, Output, float, 1, kRound>;
#endif

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ColumnMajor, kOutputAlignment, Output,
    ColumnMajor, kOutputAlignment, EpilogueSchedule, Fusion>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, RowMajor, kInputAlignment, Element, ColumnMajor,
    kInputAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    Schedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
using Layouts = typename Mainloop::SparseConfig;

static_assert(Layouts::TensorEAtomM::value == 64 && Layouts::TensorEAtomK::value == kDepth,
              "the metadata layout is not the one that sparsecomp/packing/layouts/wgmma.py writes");

enum Result : int { kMisaligned = 1001, kSizes, kActivation, kScales, kWorkspace };

bool aligned(void const* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int check(sparsecomp_wgmma_sp_arguments const& a) {
  if (!aligned(a.values) || !aligned(a.metadata) || !aligned(a.x) || !aligned(a.y) ||
      a.x_stride % kInputAlignment != 0 || a.y_stride % kOutputAlignment != 0) {
    return kMisaligned;
  }
  if (a.out < 1 || a.tokens < 1 || a.columns < 1 || a.x_stride < a.columns || a.y_stride < a.out ||
      a.multiprocessors < 1 || a.swizzle < 1) {
    return kSizes;
  }
  if (a.activation < kNone || a.activation > kSilu) {
    return kActivation;
  }
  if (SC_SCALED != 0 && (a.weight_scales == nullptr || a.x_scales == nullptr)) {
    return kScales;
  }
  return 0;
}

int launch(sparsecomp_wgmma_sp_arguments const& a, cudaStream_t stream) {
  if (int const result = check(a); result != 0) {
    return result;
  }
  int const depth = (a.columns + kDepth - 1) / kDepth * kDepth;
  auto const shape = make_shape(int(a.out), int(a.tokens), int(a.columns), 1);
  auto const stored = make_shape(int(a.out), int(a.tokens), depth, 1);
  typename Kernel::StrideB x_stride{};
  typename Kernel::StrideD y_stride{};
  get<0>(x_stride) = a.x_stride;
  get<1>(y_stride) = a.y_stride;

  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      shape,
      {static_cast<Element const*>(a.values), Layouts::fill_layoutA(stored), static_cast<Element const*>(a.x), x_stride,
       static_cast<typename Mainloop::ElementE const*>(a.metadata), Layouts::fill_layoutE(stored)},
      {{}, nullptr, {}, static_cast<Output*>(a.y), y_stride},
      {}};
  arguments.hw_info.device_id = a.device;
  arguments.hw_info.sm_count = a.multiprocessors;
  arguments.scheduler.max_swizzle_size = a.swizzle;
  Output const* bias = static_cast<Output const*>(a.bias);
#if SC_SCALED
  arguments.epilogue.thread = {{{a.weight_scales, 0.f, {a.scale_per_row != 0, _0{}, 0}},
                                {{a.x_scales, 0.f, {_0{}, a.scale_per_token != 0, 0}}, {}, {}},
                                {bias, Output(0), {}},
                                {}},
                               {a.activation}};
#else
  arguments.epilogue.thread.bias_ptr = bias;
  arguments.epilogue.thread.activation.kind = a.activation;
#endif

  if (Gemm::get_workspace_size(arguments) != 0) {
    return kWorkspace;
  }
  Gemm gemm;
  if (cutlass::Status const status = gemm.initialize(arguments, nullptr, stream); status != cutlass::Status::kSuccess) {
    return static_cast<int>(status);
  }
  return static_cast<int>(gemm.run(stream));
}

}  // namespace
}  // namespace sparsecomp

extern "C" int sparsecomp_wgmma_sp_abi(void) { return SPARSECOMP_WGMMA_SP_ABI; }

extern "C" int sparsecomp_wgmma_sp(sparsecomp_wgmma_sp_arguments const* arguments, void* stream) {
  return sparsecomp::launch(*arguments, static_cast<cudaStream_t>(stream));
}

extern "C" char const* sparsecomp_wgmma_sp_error(int result) {
  switch (result) {
    case sparsecomp::kMisaligned:
      return "an operand does not start, or its rows do not, at a multiple of 16 bytes";
    case sparsecomp::kSizes:
      return "a size or a stride is out of range";
    case sparsecomp::kActivation:
      return "the activation is not known";
    case sparsecomp::kScales:
      return "scales are missing";
    case sparsecomp::kWorkspace:
      return "CUTLASS asks for a workspace, which this library never gives";
    default:
      return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(result));
  }
}
