// Numbers as the rules see them: storage types, and conversions and a square root that each round once.
//
// Written over a float type F and an unsigned integer type U of as many bits, so that the same text serves one element
// (float, uint32_t), on a host or a device, and a SIMD vector of them (simd.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define XGRAD_HD __host__ __device__ __forceinline__
#else
#define XGRAD_HD inline __attribute__((always_inline))
#endif

// Each build for an instruction set keeps its functions in a namespace of its own: were their names the same, the
// linker would keep one copy for all, and it could be one that this machine can't execute.
#ifndef XGRAD_ISA
#define XGRAD_ISA baseline
#endif

namespace xgrad {
inline namespace XGRAD_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class Storage> struct ComputeType {
  using Type = float;
};
template <> struct ComputeType<double> {
  using Type = double;
};
template <class Storage> using Compute = typename ComputeType<Storage>::Type;

template <class To, class From> XGRAD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 16 bits, in the low half of a U, to the float that they are; exact. GPUs have instructions for it.
template <class F, class U> XGRAD_HD F widen(U half, BFloat16) { return bit_cast<F>(half << 16); }

template <class F, class U> XGRAD_HD F widen(U half, Float16) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(static_cast<uint16_t>(half)));
#else
  const U sign = (half & 0x8000u) << 16;
  const U magnitude = (half & 0x7FFFu) << 13;
  const U normal = magnitude + (112u << 23);                 // the exponent's bias grows from 15 to 127
  const U special = magnitude + (224u << 23);                // infinity and NaN: the largest exponent stays the largest
  const F shifted = bit_cast<F>(magnitude + (113u << 23)) - 0x1p-14f;  // a subnormal is an offset from the least normal
  const U is_normal_or_special = magnitude >= (1u << 23) ? normal : bit_cast<U>(shifted);
  return bit_cast<F>(sign | (magnitude >= (31u << 23) ? special : is_normal_or_special));
#endif
}

// A float's bits to those of the nearest BFloat16, which are their upper half; ties to even. A NaN must be a clean one,
// whose lower half is 0: in another the carry might run through the exponent. The upper half's last bit makes a tie more
// than one where it is odd, and nothing else of another lower half.
template <class U> XGRAD_HD U round_to_upper_half(U bits) {
  return ((bits | ((bits >> 16) & 1u)) + 0x7FFFu) & 0xFFFF0000u;
}

// The number with a clean NaN, where numbers are rounded to Storage. No operation makes others of clean ones.
template <class Storage, class T> XGRAD_HD T clean(T x) {
  if constexpr (std::is_same<Storage, BFloat16>::value) {
    const T quiet_nan = T{} + __builtin_nanf("");
    return x != x ? quiet_nan : x;
  } else {
    return x;
  }
}

// A float to the nearest 16-bit number, ties to even; any NaN to the quiet one that torch writes.
template <class U, class F> XGRAD_HD U narrow(F x, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const U quiet_nan = U{} + 0x7FC0u;
  return x != x ? quiet_nan : round_to_upper_half(bit_cast<U>(x)) >> 16;
#endif
}

template <class U, class F> XGRAD_HD U narrow(F x, Float16) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  const U bits = bit_cast<U>(x);
  const U sign = (bits & 0x80000000u) >> 16;
  const U magnitude = bits & 0x7FFFFFFFu;
  const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last bit with that of a subnormal half, and the addition itself rounds.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
  const U infinity = U{} + 0x7C00u;
  const U quiet_nan = U{} + 0x7E00u;
  const U special = magnitude > 0x7F800000u ? quiet_nan : infinity;
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  return sign | (magnitude >= (143u << 23) ? special : finite);
#endif
}

// What the rules ask of a number type. The scalars' here; a SIMD vector's is in simd.h.
template <class T> struct Numeric;

template <> struct Numeric<double> {
  XGRAD_HD static double square_root(double x) { return std::sqrt(x); }
  template <class Storage> XGRAD_HD static double round(double x) { return x; }
  XGRAD_HD static double load(const double* address) { return *address; }
  XGRAD_HD static void store(double* address, double x) { *address = x; }
};

template <> struct Numeric<float> {
  XGRAD_HD static float square_root(float x) { return sqrtf(x); }
  XGRAD_HD static float round_as(float x, float) { return x; }
  template <class Half> XGRAD_HD static float round_as(float x, Half half) {
    return widen<float>(narrow<uint32_t>(x, half), half);
  }
  // The nearest number that Storage can hold.
  template <class Storage> XGRAD_HD static float round(float x) { return round_as(x, Storage{}); }

  XGRAD_HD static float load(const float* address) { return *address; }
  XGRAD_HD static void store(float* address, float x) { *address = x; }
  template <class Half> XGRAD_HD static float load(const Half* address) {
    return widen<float>(uint32_t{address->bits}, Half{});
  }
  template <class Half> XGRAD_HD static void store(Half* address, float x) {
    address->bits = static_cast<uint16_t>(narrow<uint32_t>(x, Half{}));
  }
};

// base^exponent by repeated squaring, each product rounded once: the same bits wherever it runs, which no library's pow
// promises.
XGRAD_HD double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// NaN where either is, as torch.maximum.
template <class T> XGRAD_HD T maximum(T a, T b) { return a != a ? a : (a > b ? a : b); }

}  // namespace XGRAD_ISA
}  // namespace xgrad
