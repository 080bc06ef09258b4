// The CPU kernels by what they run, one set for each instruction set that multi_tensor_cpu.cpp is compiled for.
#pragma once

#include "launch.h"

namespace xgrad {

#define XGRAD_DECLARE_ISA(isa)                                              \
  namespace isa {                                                           \
  Kernel find_kernel(const char* rule, Dtype param_dtype, Dtype state_dtype); \
  int64_t count_columns(const char* rule);                                  \
  }

// nullptr, or 0, where there is no rule of this name; nullptr where its combination of dtypes does not exist.
XGRAD_DECLARE_ISA(baseline)
XGRAD_DECLARE_ISA(avx2)
XGRAD_DECLARE_ISA(avx512)

#undef XGRAD_DECLARE_ISA

}  // namespace xgrad
