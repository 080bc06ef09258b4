// In the place of CUDA's header, for a host compiler: kernels are functions, which emulation.cpp calls for every thread
// of every block, in order. That is a valid schedule of kernels whose threads do not wait for each other.
#pragma once

#include <cstddef>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __isGlobal(pointer) true
#define __builtin_assume(condition) static_cast<void>(condition)

struct dim3 {
  unsigned x;
  explicit constexpr dim3(unsigned size = 1) : x(size) {}
};

inline thread_local dim3 blockIdx, threadIdx;
