// What the kernels for AVX2 and for AVX-VNNI share: sixteen lanes as two registers, weights of 16
// columns as four cell rows of bytes, a super-block's floats, integer sums.
#pragma once
#include <cstring>

#include "lanes_avx2.h"
#include "matmul.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 4;  // of two registers each, beside 2 of weights and 1 of x
constexpr int kIntTile = 16, kQ4KTile = 16;
constexpr int kRowsInRegisters = 2;

constexpr int groups_at_once(int) { return 1; }

SHOAL_INLINE __m256i load_bytes(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
SHOAL_INLINE __m128i load_halves(const uint8_t* p) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(p));
}
SHOAL_INLINE __m256i broadcast4(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// Cells of both halves of the lanes.
struct Ints {
  __m256i low, high;
};
SHOAL_INLINE Ints add32(const Ints& a, const Ints& b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
SHOAL_INLINE Ints set32(const int32_t* p) {
  const __m256i v = broadcast4(p);
  return {v, v};
}
SHOAL_INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// s16 pairs times a factor -> s32.
SHOAL_INLINE Ints sum_pairs(const Ints& pairs, const Ints& factor) {
  return {_mm256_madd_epi16(pairs.low, factor.low), _mm256_madd_epi16(pairs.high, factor.high)};
}
SHOAL_INLINE Ints sum_pairs(const Ints& pairs, int factor) {
  const __m256i f = _mm256_set1_epi16(int16_t(factor));
  return sum_pairs(pairs, Ints{f, f});
}
SHOAL_INLINE Lanes to_floats(const Ints& s) {
  return {_mm256_cvtepi32_ps(s.low), _mm256_cvtepi32_ps(s.high)};
}
SHOAL_INLINE Lanes load_scales(const uint8_t* p) {
  return {_mm256_cvtph_ps(load_halves(p)), _mm256_cvtph_ps(load_halves(p + 16))};
}

// N, hidden where unrolling a loop over the rows would spill the weights.
template <int N>
SHOAL_INLINE int rolled() {
  int n = N;
  if (N > 2) asm("" : "+r"(n));
  return n;
}

// Low (shift 0) or high (4) nibbles of a cell row.
SHOAL_INLINE Ints nibbles(const uint8_t* cells, int shift) {
  const __m256i low4 = _mm256_set1_epi8(15);
  const __m256i a = load_bytes(cells), b = load_bytes(cells + 32);
  if (shift == 0) return {_mm256_and_si256(a, low4), _mm256_and_si256(b, low4)};
  return {_mm256_and_si256(_mm256_srli_epi16(a, 4), low4),
          _mm256_and_si256(_mm256_srli_epi16(b, 4), low4)};
}

// 16 columns of a row group: the bytes of four cell rows.
struct Quad {
  Ints w[4];
};
SHOAL_INLINE Quad load_quad(const uint8_t* cells, int shift) {
  Quad q;
  for (int j = 0; j < 4; ++j) q.w[j] = nibbles(cells + j * kCellRow, shift);
  return q;
}

// Looks up the levels of the codes in the low four bits of each byte; bit 7 must be 0.
SHOAL_INLINE Ints look_up(const Ints& codes, const uint8_t* levels) {
  const __m256i table = _mm256_broadcastsi128_si256(load_halves(levels));
  return {_mm256_shuffle_epi8(table, codes.low), _mm256_shuffle_epi8(table, codes.high)};
}
template <int Shift>
SHOAL_INLINE Ints bits(const uint8_t* cells, int mask) {  // of a cell row
  const __m256i keep = _mm256_set1_epi8(char(mask));
  return {_mm256_and_si256(_mm256_srli_epi16(load_bytes(cells), Shift), keep),
          _mm256_and_si256(_mm256_srli_epi16(load_bytes(cells + 32), Shift), keep)};
}
SHOAL_INLINE Ints either(const Ints& a, const Ints& b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}

// The levels of 16 columns: of the first or the second half of a block.
SHOAL_INLINE Quad load_levels(Q4_T, const uint8_t* cells, int half) {
  Quad q = load_quad(cells, 4 * half);
  for (Ints& w : q.w) w = look_up(w, kLevels4);
  return q;
}
SHOAL_INLINE Quad load_levels(Q3_T, const uint8_t* cells, int half) {
  const uint8_t *row1 = cells + kCellRow, *row2 = cells + 2 * kCellRow;
  Quad q =
      half == 0
          ? Quad{{bits<0>(cells, 7), bits<3>(cells, 7), bits<0>(row1, 7), bits<3>(row1, 7)}}
          : Quad{{bits<0>(row2, 7), bits<3>(row2, 7), either(bits<6>(cells, 3), bits<4>(row1, 4)),
                  either(bits<6>(row2, 3), bits<5>(row1, 4))}};
  for (Ints& w : q.w) w = look_up(w, kLevels3);
  return q;
}

// The 6-bit scales of a sub-block.
SHOAL_INLINE Ints load_sub_scales(const uint8_t* record, int sub_block) {
  const __m128i bytes = load_halves(record + Q4_K::scales + sub_block * kLanes);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
}

// The lines of a super-block's header and of chunk c, `ahead` bytes before they are needed.
SHOAL_INLINE void fetch_header(const uint8_t* record, int ahead) {
  if (ahead > 0) prefetch_weights(record, Q4_K::quants, ahead);
  // Read last: in their place of the stream they keep the hardware's prefetcher on it.
  for (int i = 0; ahead == 0 && i < Q4_K::quants; i += 64) __builtin_prefetch(record + i);
}
SHOAL_INLINE void fetch_chunk(const uint8_t* record, int c, int ahead) {
  if (ahead > 0) prefetch_weights(record + Q4_K::quants + c * Q4_K::chunk, Q4_K::chunk, ahead);
}

// Floats appear once per super-block.
template <int N>
SHOAL_INLINE void q4_k_finish(const uint8_t* record, const Ints* dots, const float* x_scale,
                              const int16_t* x_sums, Lanes* acc) {
  const Lanes d = load_scales(record + Q4_K::d), dmin = load_scales(record + Q4_K::dmin);
  Ints min[4];
  for (int c = 0; c < 4; ++c) {
    const uint8_t* at = record + Q4_K::mins + c * 32;
    min[c] = {_mm256_cvtepu8_epi16(load_halves(at)), _mm256_cvtepu8_epi16(load_halves(at + 16))};
  }
  for (int t = 0, n = rolled<N>(); t < n; ++t) {
    const int16_t* sums = x_sums + t * 8;
    Ints mins = zero_ints();
    for (int c = 0; c < 4; ++c) {
      const __m256i two = broadcast4(sums + 2 * c);
      mins = add32(mins, sum_pairs(min[c], Ints{two, two}));
    }
    const Lanes value = fms(d, to_floats(dots[t]), mul(dmin, to_floats(mins)));
    acc[t] = fma(set1(x_scale[t]), value, acc[t]);
  }
}

// AVX2 converts no float to int64: in double, adding 1.5 * 2^52 leaves the rounded integer in the
// low mantissa bits.  float -> double and the product with a power of two are exact.
SHOAL_INLINE __m256d add_four(int64_t* sums, __m128 p, __m256d two_to_grid) {
  const __m256d v = _mm256_mul_pd(_mm256_cvtps_pd(p), two_to_grid);
  const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v);
  const __m256d good = _mm256_cmp_pd(magnitude, _mm256_set1_pd(0x1p44), _CMP_LT_OQ);
  const __m256d shifted = _mm256_add_pd(v, _mm256_set1_pd(0x1.8p52));
  const __m256i q =
      _mm256_sub_epi64(_mm256_castpd_si256(shifted), _mm256_set1_epi64x(0x4338000000000000));
  __m256i* at = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), q));
  return good;
}

SHOAL_INLINE bool add_quanta(int64_t* sums, const Lanes& y, float weight, double two_to_grid) {
  const __m256 w = _mm256_set1_ps(weight);
  const __m256 low = _mm256_mul_ps(w, y.low), high = _mm256_mul_ps(w, y.high);
  const __m256d scale = _mm256_set1_pd(two_to_grid);
  const __m256d a = add_four(sums, _mm256_castps256_ps128(low), scale);
  const __m256d b = add_four(sums + 4, _mm256_extractf128_ps(low, 1), scale);
  const __m256d c = add_four(sums + 8, _mm256_castps256_ps128(high), scale);
  const __m256d d = add_four(sums + 12, _mm256_extractf128_ps(high, 1), scale);
  return _mm256_movemask_pd(_mm256_and_pd(_mm256_and_pd(a, b), _mm256_and_pd(c, d))) == 15;
}

}  // namespace
}  // namespace shoal
