// Sixteen float32 lanes as two AVX2 registers; lanes_scalar.h says what each function means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "exact_constants.h"

namespace shoal {
namespace {

struct Lanes {
  __m256 low, high;
};

SHOAL_INLINE Lanes set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SHOAL_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SHOAL_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SHOAL_INLINE void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}

// All ones in lanes [0, n) of the eight that start at `base`.
SHOAL_INLINE __m256i first_mask(int n, int base) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - base), index);
}
SHOAL_INLINE Lanes load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_mask(n, 0)), _mm256_maskload_ps(p + 8, first_mask(n, 8))};
}
SHOAL_INLINE void store_first(float* p, Lanes a, int n) {
  _mm256_maskstore_ps(p, first_mask(n, 0), a.low);
  _mm256_maskstore_ps(p + 8, first_mask(n, 8), a.high);
}

SHOAL_INLINE Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes sub(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes mul(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes div(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
SHOAL_INLINE Lanes fms(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
SHOAL_INLINE Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes min(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
SHOAL_INLINE Lanes where_greater(Lanes a, Lanes b, Lanes value) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), value.low),
          _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ), value.high)};
}
SHOAL_INLINE Lanes abs(Lanes a) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  return {_mm256_and_ps(a.low, magnitude), _mm256_and_ps(a.high, magnitude)};
}
SHOAL_INLINE Lanes keep_range(Lanes a, int low, int high, float other) {
  const __m256 o = _mm256_set1_ps(other);
  const __m256i keep_low = _mm256_andnot_si256(first_mask(low, 0), first_mask(high, 0));
  const __m256i keep_high = _mm256_andnot_si256(first_mask(low, 8), first_mask(high, 8));
  return {_mm256_blendv_ps(o, a.low, _mm256_castsi256_ps(keep_low)),
          _mm256_blendv_ps(o, a.high, _mm256_castsi256_ps(keep_high))};
}

SHOAL_INLINE float fold_sum(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SHOAL_INLINE float fold_max(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

SHOAL_INLINE Lanes load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SHOAL_INLINE void store_half(uint16_t* p, Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, kNearest));
}
SHOAL_INLINE __m256 widen_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
SHOAL_INLINE Lanes load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

SHOAL_INLINE __m256 exp8(__m256 x) {
  x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(Exp::highest)), _mm256_set1_ps(Exp::lowest));
  const __m256 hi = _mm256_set1_ps(Exp::log2e_hi), rounder = _mm256_set1_ps(Exp::rounder);
  const __m256 n = _mm256_sub_ps(_mm256_fmadd_ps(x, hi, rounder), rounder);
  __m256 f = _mm256_fmsub_ps(x, hi, n);
  f = _mm256_fmadd_ps(x, _mm256_set1_ps(Exp::log2e_lo), f);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(Exp::c6), f, _mm256_set1_ps(Exp::c5));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Exp::c4));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Exp::c3));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Exp::c2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Exp::c1));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Exp::c0));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
SHOAL_INLINE Lanes exp(Lanes a) { return {exp8(a.low), exp8(a.high)}; }

}  // namespace
}  // namespace shoal
