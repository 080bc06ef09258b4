// The CUDA kernels by what they run, one set for each rule that multi_tensor_cuda.cu is compiled for.
#pragma once

#include "element.h"
#include "launch.h"
#include "rows.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// Of a block. Several such blocks fit a multiprocessor at once, and a full chunk is many rounds of one.
constexpr int kThreads = 256;

// What cudaLaunchKernel takes; nullptr where there is no kernel for these dtypes and buffers.
struct DeviceKernels {
  const void* multi_tensor;  // of a Launch, a block per chunk
  const void* make_rows;     // of a RowsLaunch, a thread per tensor
};

template <class Rule> DeviceKernels find_kernels(Dtype param_dtype, Dtype state_dtype, Buffers buffers);

}  // namespace XGRAD_ISA
}  // namespace xgrad
