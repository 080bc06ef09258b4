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

// What has no operator: the square root, a test of all lanes and, where the processor has them, its own conversions of
// Float16.
#if defined(__AVX512F__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm512_sqrt_pd((__m512d)x); }
XGRAD_HD bool has_nan(Vector<float> a, Vector<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
}
XGRAD_HD Vector<float> widen_float16(Halves halves) { return (Vector<float>)_mm512_cvtph_ps((__m256i)halves); }
XGRAD_HD Halves narrow_float16(Vector<float> x) {
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__) && defined(__F16C__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm256_sqrt_pd((__m256d)x); }
XGRAD_HD bool has_nan(Vector<float> a, Vector<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}
XGRAD_HD Vector<float> widen_float16(Halves halves) { return (Vector<float>)_mm256_cvtph_ps((__m128i)halves); }
XGRAD_HD Halves narrow_float16(Vector<float> x) {
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

XGRAD_HD Vector<float> widen_float16(Halves halves) { return widen<Vector<float>>(widen_lanes(halves), Float16{}); }
XGRAD_HD Halves narrow_float16(Vector<float> x) { return narrow_lanes(narrow<UInts>(x, Float16{})); }

#if defined(__x86_64__)

XGRAD_HD Vector<float> sqrt_vector(Vector<float> x) { return (Vector<float>)_mm_sqrt_ps((__m128)x); }
XGRAD_HD Vector<double> sqrt_vector(Vector<double> x) { return (Vector<double>)_mm_sqrt_pd((__m128d)x); }
XGRAD_HD bool has_nan(Vector<float> a, Vector<float> b) {
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
}

#else

template <class V> XGRAD_HD V sqrt_vector(V x) {
  constexpr int kLength = sizeof(V) / sizeof(x[0]);
  for (int lane = 0; lane < kLength; ++lane) x[lane] = Numeric<decltype(+x[0])>::square_root(x[lane]);
  return x;
}

XGRAD_HD bool has_nan(Vector<float> a, Vector<float> b) {
  const auto is_nan = (a != a) | (b != b);
  bool found = false;
  for (int lane = 0; lane < kLanes<float>; ++lane) found = found || is_nan[lane] != 0;
  return found;
}

#endif
#endif

template <> struct Numeric<Vector<double>> {
  using V = Vector<double>;
  XGRAD_HD static V square_root(V x) { return sqrt_vector(x); }
  template <class Storage> XGRAD_HD static V round(V x) { return x; }
};

template <> struct Numeric<Vector<float>> {
  using V = Vector<float>;
  XGRAD_HD static V square_root(V x) { return sqrt_vector(x); }

  // A BFloat16 is rounded in its lane of 32 bits, which costs less than to pack it and unpack it again.
  XGRAD_HD static V round_as(V x, float) { return x; }
  XGRAD_HD static V round_as(V x, Float16) { return widen_float16(narrow_float16(x)); }
  XGRAD_HD static V round_as(V x, BFloat16) { return bit_cast<V>(round_to_upper_half(bit_cast<UInts>(x))); }
  template <class Storage> XGRAD_HD static V round(V x) { return round_as(x, Storage{}); }
};

// A block is consecutive numbers of one buffer, as vectors. Which of them is in which lane is the same for all buffers
// whose blocks have as many vectors.

template <class Storage, class V, int n> XGRAD_HD void clean_block(V (&block)[n]) {
  if constexpr (std::is_same<Storage, BFloat16>::value) {
    if (__builtin_expect(has_nan(block[0], block[n - 1]), false)) {
      for (V& x : block) x = clean<Storage>(x);
    }
  }
}

XGRAD_HD void load_block(const double* address, Vector<double> (&block)[1]) {
  block[0] = load_vector<Vector<double>>(address);
}

XGRAD_HD void store_block(double* address, Vector<double> (&block)[1]) { store_vector(address, block[0]); }

template <int n> XGRAD_HD void load_block(const float* address, Vector<float> (&block)[n]) {
  for (int i = 0; i < n; ++i) block[i] = load_vector<Vector<float>>(address + i * kLanes<float>);
}

template <int n> XGRAD_HD void store_block(float* address, const Vector<float> (&block)[n]) {
  for (int i = 0; i < n; ++i) store_vector(address + i * kLanes<float>, block[i]);
}

template <int n> XGRAD_HD void load_block(const Float16* address, Vector<float> (&block)[n]) {
  for (int i = 0; i < n; ++i) block[i] = widen_float16(load_vector<Halves>(address + i * kLanes<float>));
}

template <int n> XGRAD_HD void store_block(Float16* address, const Vector<float> (&block)[n]) {
  for (int i = 0; i < n; ++i) store_vector(address + i * kLanes<float>, narrow_float16(block[i]));
}

XGRAD_HD void load_block(const BFloat16* address, Vector<float> (&block)[1]) {
  block[0] = bit_cast<Vector<float>>(widen_lanes(load_vector<Halves>(address)) << 16);
}

// Two vectors are the even numbers and the odd ones, as a BFloat16 is the upper half of its float: a shift and a mask in
// place of several instructions for each vector that unpack and pack.
XGRAD_HD void load_block(const BFloat16* address, Vector<float> (&block)[2]) {
  const UInts pairs = load_vector<UInts>(address);
  block[0] = bit_cast<Vector<float>>(pairs << 16);
  block[1] = bit_cast<Vector<float>>(pairs & 0xFFFF0000u);
}

// BFloat16s are stored as they have been rounded; any NaN as the quiet one that torch writes.
XGRAD_HD void store_block(BFloat16* address, Vector<float> (&block)[1]) {
  clean_block<BFloat16>(block);
  store_vector(address, narrow_lanes(bit_cast<UInts>(block[0]) >> 16));
}

XGRAD_HD void store_block(BFloat16* address, Vector<float> (&block)[2]) {
  clean_block<BFloat16>(block);
  store_vector(address, bit_cast<UInts>(block[0]) >> 16 | bit_cast<UInts>(block[1]));
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
