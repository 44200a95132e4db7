// Sixteen float32 lanes as one AVX-512 register; lanes_scalar.h says what each function means.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "exact_constants.h"

namespace shoal {
namespace {

struct Lanes {
  __m512 v;
};

SHOAL_INLINE Lanes set1(float x) { return {_mm512_set1_ps(x)}; }
SHOAL_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
SHOAL_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
SHOAL_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }

// One bit per lane in [0, n).
SHOAL_INLINE __mmask16 first_mask(int n) { return __mmask16((1u << n) - 1); }
SHOAL_INLINE Lanes load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_mask(n), p)};
}
SHOAL_INLINE void store_first(float* p, Lanes a, int n) {
  _mm512_mask_storeu_ps(p, first_mask(n), a.v);
}

SHOAL_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SHOAL_INLINE Lanes fms(Lanes a, Lanes b, Lanes c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
SHOAL_INLINE Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
SHOAL_INLINE Lanes where_greater(Lanes a, Lanes b, Lanes value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), value.v)};
}
SHOAL_INLINE Lanes abs(Lanes a) { return {_mm512_abs_ps(a.v)}; }
SHOAL_INLINE Lanes keep_range(Lanes a, int low, int high, float other) {
  const __mmask16 keep = __mmask16(first_mask(high) & ~first_mask(low));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), keep, a.v)};
}

SHOAL_INLINE __m256 lower_half(__m512 v) { return _mm512_castps512_ps256(v); }
SHOAL_INLINE __m256 upper_half(__m512 v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}
SHOAL_INLINE float fold_sum(Lanes a) {
  const __m256 eight = _mm256_add_ps(lower_half(a.v), upper_half(a.v));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SHOAL_INLINE float fold_max(Lanes a) {
  const __m256 eight = _mm256_max_ps(lower_half(a.v), upper_half(a.v));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

SHOAL_INLINE Lanes load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SHOAL_INLINE void store_half(uint16_t* p, Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, kNearest));
}
SHOAL_INLINE Lanes load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}

SHOAL_INLINE Lanes exp(Lanes a) {
  __m512 x = _mm512_min_ps(a.v, _mm512_set1_ps(Exp::highest));
  x = _mm512_max_ps(x, _mm512_set1_ps(Exp::lowest));
  const __m512 hi = _mm512_set1_ps(Exp::log2e_hi), rounder = _mm512_set1_ps(Exp::rounder);
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, hi, rounder), rounder);
  __m512 f = _mm512_fmsub_ps(x, hi, n);
  f = _mm512_fmadd_ps(x, _mm512_set1_ps(Exp::log2e_lo), f);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(Exp::c6), f, _mm512_set1_ps(Exp::c5));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Exp::c4));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Exp::c3));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Exp::c2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Exp::c1));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Exp::c0));
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return {_mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)))};
}

}  // namespace
}  // namespace shoal
