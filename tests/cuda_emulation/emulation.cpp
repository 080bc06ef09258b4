// The kernels of multi_tensor_cuda.cu as host code, behind two C functions.
#include <cuda_runtime.h>

#include "../../csrc/multi_tensor_cuda.h"

using namespace xgrad;

namespace {

// What cudaLaunchKernel would do.
template <class Argument> const char* run(const void* kernel, int64_t n_blocks, const Argument& argument) {
  if (kernel == nullptr) return "there is no kernel for these dtypes and buffers";
  const auto run_thread = reinterpret_cast<void (*)(Argument)>(reinterpret_cast<std::uintptr_t>(kernel));
  for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(n_blocks); ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) run_thread(argument);
  }
  return nullptr;
}

DeviceKernels find(const char* rule, Dtype param_dtype, Dtype state_dtype, Buffers buffers) {
  return with_rule(rule, [=](auto found) { return find_kernels<decltype(found)>(param_dtype, state_dtype, buffers); },
                   [] { return DeviceKernels{}; });
}

}  // namespace

extern "C" const char* run_emulated(const Launch* launch, int64_t n_chunks, const char* rule, int param_dtype,
                                    int state_dtype, const Buffers* buffers) {
  const Dtype param = static_cast<Dtype>(param_dtype), state = static_cast<Dtype>(state_dtype);
  return run(find(rule, param, state, *buffers).multi_tensor, n_chunks, *launch);
}

extern "C" const char* make_rows_emulated(const RowsLaunch* launch, const char* rule, bool is_double) {
  const Dtype dtype = is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  return run(find(rule, dtype, dtype, Buffers{}).make_rows, (launch->n_tensors + kThreads - 1) / kThreads, *launch);
}
