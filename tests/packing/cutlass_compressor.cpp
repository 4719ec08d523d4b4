// CUTLASS's own compressor of 2:4 weights for sm_90, its device code run on the CPU with one thread for each of CUDA's.
//
//   cutlass_compressor f16|bf16|e4m3 ROWS COLUMNS < dense > compressed values, then metadata
//
// tests/packing/record_wgmma.py compiles and runs it; it is needed only to record the golden bytes anew.
#include <cuda_runtime.h>

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace emulated {
inline thread_local uint3 thread, block;
inline dim3 blocks, threads;
inline std::barrier<>* barrier;
}  // namespace emulated
#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::blocks
#define blockDim emulated::threads
static inline void __syncthreads() { emulated::barrier->arrive_and_wait(); }

#include "cute/pointer_sparse.hpp"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"

using namespace cute;

template <class Element>
int compress(int rows, int columns) {
  using Sizes = Shape<int, int, int, int>;
  using Config =
      cutlass::Sm90GemmSparseConfig<sparse_elem<2, Element>, GMMA::Major::K, sparse_elem<8, uint8_t>, Int<128>>;
  using RowMajor = cutlass::layout::RowMajor;
  using Compressor =
      cutlass::transform::kernel::StructuredSparseCompressor<Sizes, Element, RowMajor, Config, cutlass::arch::Sm90>;
  using Utility = cutlass::transform::kernel::StructuredSparseCompressorUtility<Sizes, Element, RowMajor, Config>;

  Sizes const sizes{rows, 1, columns, 1};
  auto const stride = make_stride(int64_t(columns), _1{}, int64_t(0));
  Utility utility(sizes, stride);
  std::vector<Element> dense(size_t(rows) * columns);
  if (fread(dense.data(), sizeof(Element), dense.size(), stdin) != dense.size()) {
    fprintf(stderr, "the weight on standard input is too short\n");
    return 1;
  }
  std::vector<Element> values(size_t(utility.get_tensorA_m_physical()) * utility.get_tensorA_k_physical());
  std::vector<uint8_t> metadata(size_t(utility.get_metadata_m_physical()) * utility.get_metadata_k_physical());

  typename Compressor::Params params{sizes, {dense.data(), stride, values.data(), metadata.data()}, {}, nullptr};
  emulated::blocks = Compressor::get_grid_shape(params);
  emulated::threads = dim3(Compressor::MaxThreadsPerBlock, 1, 1);
  std::barrier<> barrier(Compressor::MaxThreadsPerBlock);
  emulated::barrier = &barrier;
  std::vector<uint8_t> memory(Compressor::SharedStorageSize + 256);
  void* shared = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
  std::vector<std::thread> threads;
  for (unsigned index = 0; index < Compressor::MaxThreadsPerBlock; ++index) {
    threads.emplace_back([&, index] {
      emulated::thread = {index, 0, 0};
      for (unsigned y = 0; y < emulated::blocks.y; ++y) {
        for (unsigned x = 0; x < emulated::blocks.x; ++x) {
          emulated::block = {x, y, 0};
          Compressor{}(params, static_cast<char*>(shared));
          barrier.arrive_and_wait();
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  fwrite(values.data(), sizeof(Element), values.size(), stdout);
  fwrite(metadata.data(), 1, metadata.size(), stdout);
  return 0;
}

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: %s f16|bf16|e4m3 ROWS COLUMNS\n", arguments[0]);
    return 2;
  }
  std::string const type = arguments[1];
  int const rows = atoi(arguments[2]), columns = atoi(arguments[3]);
  if (type == "f16") return compress<cutlass::half_t>(rows, columns);
  if (type == "bf16") return compress<cutlass::bfloat16_t>(rows, columns);
  return compress<cutlass::float_e4m3_t>(rows, columns);
}
