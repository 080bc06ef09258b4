// The kernels of multi_tensor_cuda.cu as host code, behind one C function.
#include <cuda_runtime.h>

#include "../../csrc/multi_tensor_cuda.h"

using xgrad::Buffers;
using xgrad::Launch;

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const auto run_thread = reinterpret_cast<void (*)(Launch)>(reinterpret_cast<std::uintptr_t>(kernel));
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) run_thread(*static_cast<Launch*>(arguments[0]));
  }
  return cudaSuccess;
}

extern "C" const char* run_emulated(const Launch* launch, int64_t n_chunks, const char* rule, int param_dtype,
                                    int state_dtype, const Buffers* buffers) {
  const auto run = [&](auto found) {
    return xgrad::run_on_device<decltype(found)>(*launch, n_chunks, static_cast<xgrad::Dtype>(param_dtype),
                                                 static_cast<xgrad::Dtype>(state_dtype), *buffers, nullptr);
  };
  return xgrad::with_rule(rule, run, [] { return "no such rule"; });
}
