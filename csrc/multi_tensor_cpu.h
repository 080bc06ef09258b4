// The CPU kernels by what they run, one set for each instruction set that multi_tensor_cpu.cpp is compiled for.
#pragma once

#include "launch.h"

namespace xgrad {

// Makes one row of a launch and the numbers after it, of a param group's options and of the numbers at an address (rows.h).
using RowMaker = void (*)(bool is_step, const int64_t* options, const void* numbers, void* row, double* next_numbers);

#define XGRAD_DECLARE_ISA(isa)                                                \
  namespace isa {                                                             \
  Kernel find_kernel(const char* rule, Dtype param_dtype, Dtype state_dtype); \
  RowMaker find_row_maker(const char* rule, bool is_double);                  \
  int64_t count_columns(const char* rule);                                    \
  int64_t count_numbers(const char* rule);                                    \
  int64_t count_options(const char* rule);                                    \
  }

// nullptr, or 0, where there is no rule of this name; nullptr where its combination of dtypes does not exist.
XGRAD_DECLARE_ISA(baseline)
XGRAD_DECLARE_ISA(avx2)
XGRAD_DECLARE_ISA(avx512)

#undef XGRAD_DECLARE_ISA

}  // namespace xgrad
