// AVX-VNNI, AVX-512 and AMX for CPUs that lack them: put this folder before the compiler's own
// headers and every _mm512 function of a kernel file becomes SIMDe's, computed with AVX2, every
// _tile function that of amx_model.h.  For tests only.
#pragma once
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// What Debian 12's SIMDe 0.7.4 lacks, as the halves that AVX2 has.
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtps_pd
#undef _mm512_cvtps_ph
#define _mm512_maskz_loadu_ps shoal_maskz_loadu_ps
#define _mm512_mask_storeu_ps shoal_mask_storeu_ps
#define _mm512_cvtepi32_ps shoal_cvtepi32_ps
#define _mm512_cvtepu16_epi32 shoal_cvtepu16_epi32
#define _mm512_cvtepu8_epi16 shoal_cvtepu8_epi16
#define _mm512_cvtepu8_epi32 shoal_cvtepu8_epi32
#define _mm512_cvtph_ps shoal_cvtph_ps
#define _mm512_cvtps_epi32 shoal_cvtps_epi32
#define _mm512_cvtps_pd shoal_cvtps_pd
#define _mm512_cvtps_ph shoal_cvtps_ph
#define SHOAL_EMULATED static inline __attribute__((unused))

SHOAL_EMULATED simde__m512 shoal_maskz_loadu_ps(simde__mmask16 mask, const void* from) {
  const float* p = static_cast<const float*>(from);
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = mask >> i & 1 ? p[i] : 0.0f;
  return simde_mm512_loadu_ps(lanes);
}
SHOAL_EMULATED void shoal_mask_storeu_ps(void* to, simde__mmask16 mask, simde__m512 a) {
  float lanes[16];
  simde_mm512_storeu_ps(lanes, a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<float*>(to)[i] = lanes[i];
}

// One 512-bit register and its two halves, in memory.
union ShoalHalves {
  simde__m512 floats;
  simde__m512i integers;
  simde__m512d doubles;
  __m256 floats256[2];
  __m256i integers256[2];
  __m256d doubles256[2];
};
SHOAL_EMULATED simde__m512 shoal_cvtepi32_ps(simde__m512i a) {
  ShoalHalves in, out;
  in.integers = a;
  for (int i = 0; i < 2; ++i) out.floats256[i] = _mm256_cvtepi32_ps(in.integers256[i]);
  return out.floats;
}
SHOAL_EMULATED simde__m512i shoal_cvtps_epi32(simde__m512 a) {
  ShoalHalves in, out;
  in.floats = a;
  for (int i = 0; i < 2; ++i) out.integers256[i] = _mm256_cvtps_epi32(in.floats256[i]);
  return out.integers;
}
SHOAL_EMULATED simde__m512i shoal_cvtepu16_epi32(__m256i a) {
  ShoalHalves out;
  out.integers256[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
  out.integers256[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
  return out.integers;
}
SHOAL_EMULATED simde__m512i shoal_cvtepu8_epi16(__m256i a) {
  ShoalHalves out;
  out.integers256[0] = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(a));
  out.integers256[1] = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1));
  return out.integers;
}
SHOAL_EMULATED simde__m512i shoal_cvtepu8_epi32(__m128i a) {
  ShoalHalves out;
  out.integers256[0] = _mm256_cvtepu8_epi32(a);
  out.integers256[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8));
  return out.integers;
}
SHOAL_EMULATED simde__m512 shoal_cvtph_ps(__m256i a) {
  ShoalHalves out;
  out.floats256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
  out.floats256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return out.floats;
}
SHOAL_EMULATED __m256i shoal_cvtps_ph(simde__m512 a, int) {  // nearest is all that is asked for
  ShoalHalves in;
  in.floats = a;
  const __m128i low = _mm256_cvtps_ph(in.floats256[0], _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(in.floats256[1], _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
SHOAL_EMULATED simde__m512d shoal_cvtps_pd(__m256 a) {
  ShoalHalves out;
  out.doubles256[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
  out.doubles256[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
  return out.doubles;
}

// AVX-VNNI's vpdpbusd, product by product.
SHOAL_EMULATED __m256i shoal_dpbusd(__m256i sums, __m256i w, __m256i x) {
  alignas(32) int32_t lanes[8];
  alignas(32) uint8_t bytes[32];
  alignas(32) int8_t signed_bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), w);
  _mm256_store_si256(reinterpret_cast<__m256i*>(signed_bytes), x);
  for (int i = 0; i < 32; ++i) lanes[i / 4] += bytes[i] * signed_bytes[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
}
#define _mm256_dpbusd_avx_epi32 shoal_dpbusd

#include "amx_model.h"
