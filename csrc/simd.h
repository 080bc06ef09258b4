// SIMD vectors as the rules' number type, as wide as the instruction set that this file is compiled for allows.
// Vectors are the compiler's own (GCC, Clang): + - * / and comparisons work on them as on numbers, lane by lane.
#pragma once

#include "numeric.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xgrad {
inline namespace XGRAD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T> struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};
template <class T> using Vector = typename VectorOf<T>::Type;

using UInts = Vector<uint32_t>;
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class V> XGRAD_HD V load_vector(const void* address) {
  V vector;
  std::memcpy(&vector, address, sizeof(vector));
  return vector;
}

template <class V> XGRAD_HD void store_vector(void* address, V vector) {
  std::memcpy(address, &vector, sizeof(vector));
}

// 16 bits to 32 and back. GCC takes five instructions for the one of AVX-512.
#if defined(__AVX512F__)
XGRAD_HD UInts widen_lanes(Halves lanes) { return (UInts)_mm512_cvtepu16_epi32((__m256i)lanes); }
XGRAD_HD Halves narrow_lanes(UInts lanes) { return (Halves)_mm512_cvtepi32_epi16((__m512i)lanes); }
#else
XGRAD_HD UInts widen_lanes(Halves lanes) { return __builtin_convertvector(lanes, UInts); }
XGRAD_HD Halves narrow_lanes(UInts lanes) { return __builtin_convertvector(lanes, Halves); }
#endif

template <class Half> XGRAD_HD Vector<float> widen_vector(Halves halves, Half half) {
  return widen<Vector<float>>(widen_lanes(halves), half);
}

template <class Half> XGRAD_HD Halves narrow_vector(Vector<float> x, Half half) {
  return narrow_lanes(narrow<UInts>(x, half));
}

// What has no operator: the square root and, where the processor has them, its own conversions of Float16.
#if defined(__AVX512F__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm512_sqrt_pd((__m512d)x); }
XGRAD_HD Vector<float> widen_vector(Halves halves, Float16) { return (Vector<float>)_mm512_cvtph_ps((__m256i)halves); }
XGRAD_HD Halves narrow_vector(Vector<float> x, Float16) {
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__) && defined(__F16C__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm256_sqrt_pd((__m256d)x); }
XGRAD_HD Vector<float> widen_vector(Halves halves, Float16) { return (Vector<float>)_mm256_cvtph_ps((__m128i)halves); }
XGRAD_HD Halves narrow_vector(Vector<float> x, Float16) {
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__x86_64__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm_sqrt_ps((__m128)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm_sqrt_pd((__m128d)x); }

#else

template <class V> XGRAD_HD V sqrt_vector(V x) {
  constexpr int kLength = sizeof(V) / sizeof(x[0]);
  for (int lane = 0; lane < kLength; ++lane) x[lane] = Numeric<decltype(+x[0])>::square_root(x[lane]);
  return x;
}

#endif

template <> struct Numeric<Vector<double>> {
  using V = Vector<double>;
  XGRAD_HD static V square_root(V x) { return sqrt_vector(x); }
  template <class Storage> XGRAD_HD static V round(V x) { return x; }
  XGRAD_HD static V load(const double* address) { return load_vector<V>(address); }
  XGRAD_HD static void store(double* address, V x) { store_vector(address, x); }
  XGRAD_HD static void store_exact(double* address, V x) { store(address, x); }
};

template <> struct Numeric<Vector<float>> {
  using V = Vector<float>;
  XGRAD_HD static V square_root(V x) { return sqrt_vector(x); }

  XGRAD_HD static V load(const float* address) { return load_vector<V>(address); }
  XGRAD_HD static void store(float* address, V x) { store_vector(address, x); }
  template <class Half> XGRAD_HD static V load(const Half* address) {
    return widen_vector(load_vector<Halves>(address), Half{});
  }
  template <class Half> XGRAD_HD static void store(Half* address, V x) {
    store_vector(address, narrow_vector(x, Half{}));
  }

  // What has been rounded already.
  template <class Storage> XGRAD_HD static void store_exact(Storage* address, V x) { store(address, x); }
  XGRAD_HD static void store_exact(BFloat16* address, V x) {
    store_vector(address, narrow_lanes(upper_half<UInts>(x)));
  }

  // A BFloat16 is rounded in its lane of 32 bits, which costs less than to pack it and unpack it again.
  XGRAD_HD static V round_as(V x, float) { return x; }
  XGRAD_HD static V round_as(V x, Float16 half) { return widen_vector(narrow_vector(x, half), half); }
  XGRAD_HD static V round_as(V x, BFloat16) { return bit_cast<V>(round_to_upper_half(bit_cast<UInts>(x))); }
  template <class Storage> XGRAD_HD static V round(V x) { return round_as(x, Storage{}); }
};

}  // namespace XGRAD_ISA
}  // namespace xgrad
