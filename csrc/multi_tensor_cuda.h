// The CUDA kernels by what they run, one set for each rule that multi_tensor_cuda.cu is compiled for.
#pragma once

#include "element.h"
#include "launch.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// Runs all chunks of a launch, whose tables and tensors are on the current device, on a stream of it; asynchronous.
// Returns nullptr, or what went wrong.
template <class Rule>
const char* run_on_device(const Launch& launch, int64_t n_chunks, Dtype param_dtype, Dtype state_dtype, Buffers buffers,
                          void* stream);

}  // namespace XGRAD_ISA
}  // namespace xgrad
