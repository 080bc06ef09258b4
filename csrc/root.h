// The square root out of multiplications, rounded as the instruction for it does. A processor divides and takes roots in
// one unit, and multiplies in others: where both are kept busy, more elements come out.
//
// With s = sqrt(x) and an estimate y = (1 + e) / s, |e| <= 2^-14:
//   g = x * y, h = y / 2            s and 1 / (2 * s), both too large by the factor 1 + e
//   r = 1/2 - g * h                 -e - e^2 / 2, but for the rounding of g
//   g + g * r, h + h * r            too small by 3/2 e^2: with the roundings within 1.25 units in the last place
//   g' + (x - g' * g') * h'         the root, where g' and h' are those
// That the last line gives the root, tests/exact_root.cpp computes for all x and all such g' and h'; for two x, 1 - 2^-24
// and 1 + 2^-23 (times powers of 4), some of them fail, and it tries all estimates.
#pragma once

#include "simd.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// a * b + c and c - a * b, rounded once.
XGRAD_HD float fused_sum(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
XGRAD_HD float fused_rest(float a, float b, float c) { return __builtin_fmaf(-a, b, c); }
#if defined(__AVX512F__)
XGRAD_HD Vector<float> fused_sum(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
XGRAD_HD Vector<float> fused_rest(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

// The last line above.
template <class F> XGRAD_HD F correct_root(F x, F root, F half_reciprocal) {
  return fused_sum(fused_rest(root, root, x), half_reciprocal, root);
}

template <class F> XGRAD_HD F refine_root(F x, F estimate) {
  const F half = F{} + 0.5f;
  const F root = x * estimate, half_reciprocal = half * estimate;
  const F error = fused_rest(root, half_reciprocal, half);
  return correct_root(x, fused_sum(root, error, root), fused_sum(half_reciprocal, error, half_reciprocal));
}

// Between these, x - g' * g' is a multiple of the smallest subnormal, and nothing is lost.
constexpr uint32_t kLeastRefined = (127u - 102u) << 23, kInfinity = 0x7F800000u;

// Numbers whose roots are multiplied.
template <class V> struct MultipliedRoots : Numeric<V> {};

#if defined(__AVX512F__)
template <> struct MultipliedRoots<Vector<float>> : Numeric<Vector<float>> {
  XGRAD_HD static Vector<float> square_root(Vector<float> x) {
    const UInts above = bit_cast<UInts>(x) - kLeastRefined;
    const __m512i range = _mm512_set1_epi32(kInfinity - kLeastRefined);
    if (__builtin_expect(_mm512_cmpge_epu32_mask((__m512i)above, range) != 0, false)) return sqrt_vector(x);
    return refine_root(x, (Vector<float>)_mm512_rsqrt14_ps((__m512)x));
  }
};
#endif

}  // namespace XGRAD_ISA
}  // namespace xgrad
