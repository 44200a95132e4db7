// What the kernels for AVX-512 and for AMX share: weights of 32 columns as eight cell rows of
// bytes, a super-block's floats, integer sums.
#pragma once
#include <cstring>

#include "lanes_avx512.h"
#include "matmul.h"

namespace shoal {
namespace {

SHOAL_INLINE __m512i load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
SHOAL_INLINE __m256i load_halves(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
SHOAL_INLINE __m512i broadcast4(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// 16 x 32 nibbles: 4 cell rows; w[j] the low and w[4 + j] the high nibbles of row j.
SHOAL_INLINE void unpack_nibbles(const uint8_t* cells, __m512i* w) {
  const __m512i low4 = _mm512_set1_epi8(15);
  for (int j = 0; j < 4; ++j) {
    const __m512i raw = load_bytes(cells + j * kCellRow);
    w[j] = _mm512_and_si512(raw, low4);
    w[4 + j] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low4);
  }
}
SHOAL_INLINE void look_up(__m512i* codes, const uint8_t* levels) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  for (int j = 0; j < 8; ++j) codes[j] = _mm512_shuffle_epi8(table, codes[j]);
}
SHOAL_INLINE __m512i bits(__m512i raw, int shift, int mask) {
  return _mm512_and_si512(_mm512_srli_epi16(raw, unsigned(shift)), _mm512_set1_epi8(char(mask)));
}

// w[j] becomes cell row j of a block: the unsigned bytes of columns 4j to 4j + 3.
SHOAL_INLINE void unpack(Q4_0, const uint8_t* cells, __m512i* w) { unpack_nibbles(cells, w); }
SHOAL_INLINE void unpack(Q4_1, const uint8_t* cells, __m512i* w) { unpack_nibbles(cells, w); }
SHOAL_INLINE void unpack(Q8_0, const uint8_t* cells, __m512i* w) {
  for (int j = 0; j < 8; ++j) w[j] = load_bytes(cells + j * kCellRow);
}
SHOAL_INLINE void unpack(Q4_T, const uint8_t* cells, __m512i* w) {
  unpack_nibbles(cells, w);
  look_up(w, kLevels4);
}
SHOAL_INLINE void unpack(Q3_T, const uint8_t* cells, __m512i* w) {
  __m512i raw[3];
  for (int r = 0; r < 3; ++r) {
    raw[r] = load_bytes(cells + r * kCellRow);
    w[2 * r] = bits(raw[r], 0, 7);
    w[2 * r + 1] = bits(raw[r], 3, 7);
  }
  w[6] = _mm512_or_si512(bits(raw[0], 6, 3), bits(raw[1], 4, 4));
  w[7] = _mm512_or_si512(bits(raw[2], 6, 3), bits(raw[1], 5, 4));
  look_up(w, kLevels3);
}
// Of sub-block 2c (high 0) or 2c + 1 (high 1) of Q4_K.
SHOAL_INLINE void unpack_sub_block(const uint8_t* record, int c, int high, __m512i* w) {
  const __m512i low4 = _mm512_set1_epi8(15);
  for (int j = 0; j < 8; ++j) {
    const __m512i raw = load_bytes(record + Q4_K::quants + c * Q4_K::chunk + j * kCellRow);
    w[j] = _mm512_and_si512(high ? _mm512_srli_epi16(raw, 4) : raw, low4);
  }
}
SHOAL_INLINE __m512i load_sub_scales(const uint8_t* record, int sub_block) {
  const uint8_t* at = record + Q4_K::scales + sub_block * kLanes;
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}

// acc[t] += float(s) * (d * x_scale), s an exact dot.
SHOAL_INLINE void add_dot(__m512i s, __m512 d, float x_scale, Lanes* acc) {
  const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x_scale));
  acc->v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, acc->v);
}
// Q4_1's: x_sum is the sum of the row's quants.
SHOAL_INLINE void add_offset_dot(__m512i s, __m512 d, __m512 m, int32_t x_sum, float x_scale,
                                 Lanes* acc) {
  const __m512 offset = _mm512_mul_ps(m, _mm512_cvtepi32_ps(_mm512_set1_epi32(x_sum)));
  const __m512 value = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(s), offset);
  acc->v = _mm512_fmadd_ps(_mm512_set1_ps(x_scale), value, acc->v);
}

// Floats appear once per super-block.
template <int N>
SHOAL_INLINE void q4_k_finish(const uint8_t* record, const __m512i* dots, const float* x_scale,
                              const int16_t* x_sums, Lanes* acc) {
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_K::d));
  const __m512 dmin = _mm512_cvtph_ps(load_halves(record + Q4_K::dmin));
  __m512i min[4];
  for (int c = 0; c < 4; ++c)
    min[c] = _mm512_cvtepu8_epi16(load_halves(record + Q4_K::mins + c * 32));
  for (int t = 0; t < N; ++t) {
    __m512i mins = _mm512_setzero_si512();
    for (int c = 0; c < 4; ++c)
      mins = _mm512_dpwssd_epi32(mins, min[c], broadcast4(x_sums + t * 8 + 2 * c));
    const __m512 offset = _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(mins));
    const __m512 value = _mm512_fmsub_ps(d, _mm512_cvtepi32_ps(dots[t]), offset);
    acc[t].v = _mm512_fmadd_ps(_mm512_set1_ps(x_scale[t]), value, acc[t].v);
  }
}

// float -> double and the product with a power of two are exact; adding 1.5 * 2^52 leaves the
// rounded integer in the low mantissa bits.
SHOAL_INLINE __mmask8 add_eight(int64_t* sums, __m256 p, __m512d two_to_grid) {
  const __m512d v = _mm512_mul_pd(_mm512_cvtps_pd(p), two_to_grid);
  const __mmask8 good = _mm512_cmp_pd_mask(_mm512_abs_pd(v), _mm512_set1_pd(0x1p44), _CMP_LT_OQ);
  const __m512d shifted = _mm512_add_pd(v, _mm512_set1_pd(0x1.8p52));
  const __m512i q =
      _mm512_sub_epi64(_mm512_castpd_si512(shifted), _mm512_set1_epi64(0x4338000000000000));
  _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_loadu_si512(sums), q));
  return good;
}

SHOAL_INLINE bool add_quanta(int64_t* sums, const Lanes& y, float weight, double two_to_grid) {
  const __m512 p = _mm512_mul_ps(_mm512_set1_ps(weight), y.v);
  const __m512d scale = _mm512_set1_pd(two_to_grid);
  const __mmask8 low = add_eight(sums, lower_half(p), scale);
  const __mmask8 high = add_eight(sums + 8, upper_half(p), scale);
  return (low & high) == 0xFF;
}

}  // namespace
}  // namespace shoal
