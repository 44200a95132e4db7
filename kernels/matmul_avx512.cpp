// Row group kernels for AVX-512 with VNNI: one register is the 16 lanes, and vpdpbusd (the
// non-saturating form) takes four activations of a row as a broadcast from memory.
#include <cstring>

#include "lanes_avx512.h"
#include "matmul.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 16;
constexpr int kIntTile = 16, kQ4KTile = 8;  // Q4_K keeps two registers a row: 16 would spill
constexpr int kRowsInRegisters = 16;

// 13-26 % for the 4-bit formats at one row (prototype, Zen 5).
constexpr bool fetches_ahead(int, int) { return true; }

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
SHOAL_INLINE __m512i dot_block(__m512i start, const __m512i* w, const int8_t* x) {
  for (int j = 0; j < 8; ++j) start = _mm512_dpbusd_epi32(start, w[j], broadcast4(x + 4 * j));
  return start;
}

// acc[t] += float(s) * (d * x_scale[t]), s the exact dot of row t.
template <int N>
SHOAL_INLINE void add_dots(const __m512i* w, __m512 d, const int8_t* x, const float* x_scale,
                           const int32_t* x_start, Lanes* acc) {
  for (int t = 0; t < N; ++t) {
    const __m512i s = dot_block(_mm512_set1_epi32(x_start[t]), w, x + t * kBlock);
    acc[t].v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_mul_ps(d, _mm512_set1_ps(x_scale[t])),
                               acc[t].v);
  }
}

template <int N>
SHOAL_INLINE void add_block(Q4_0, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  __m512i w[8];
  unpack_nibbles(record + Q4_0::quants + b * Q4_0::block_quants, w);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_0::scales + b * 32));
  add_dots<N>(w, d, x, x_scale, x_start, acc);
}

template <int N>
SHOAL_INLINE void add_block(Q8_0, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  __m512i w[8];
  for (int j = 0; j < 8; ++j)
    w[j] = load_bytes(record + Q8_0::quants + b * Q8_0::block_quants + j * kCellRow);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q8_0::scales + b * 32));
  add_dots<N>(w, d, x, x_scale, x_start, acc);
}

SHOAL_INLINE void look_up(__m512i* codes, const uint8_t* levels) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  for (int j = 0; j < 8; ++j) codes[j] = _mm512_shuffle_epi8(table, codes[j]);
}
SHOAL_INLINE __m512i bits(__m512i raw, int shift, int mask) {
  return _mm512_and_si512(_mm512_srli_epi16(raw, unsigned(shift)), _mm512_set1_epi8(char(mask)));
}

template <int N>
SHOAL_INLINE void add_block(Q4_T, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  __m512i w[8];
  unpack_nibbles(record + Q4_T::quants + b * Q4_T::block_quants, w);
  look_up(w, kLevels4);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_T::scales + b * 32));
  add_dots<N>(w, d, x, x_scale, x_start, acc);
}

template <int N>
SHOAL_INLINE void add_block(Q3_T, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  const uint8_t* cells = record + Q3_T::quants + b * Q3_T::block_quants;
  __m512i raw[3], w[8];
  for (int r = 0; r < 3; ++r) {
    raw[r] = load_bytes(cells + r * kCellRow);
    w[2 * r] = bits(raw[r], 0, 7);
    w[2 * r + 1] = bits(raw[r], 3, 7);
  }
  w[6] = _mm512_or_si512(bits(raw[0], 6, 3), bits(raw[1], 4, 4));
  w[7] = _mm512_or_si512(bits(raw[2], 6, 3), bits(raw[1], 5, 4));
  look_up(w, kLevels3);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q3_T::scales + b * 32));
  add_dots<N>(w, d, x, x_scale, x_start, acc);
}

template <int N>
SHOAL_INLINE void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  __m512i w[8];
  unpack_nibbles(record + Q4_1::quants, w);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_1::d));
  const __m512 m = _mm512_cvtph_ps(load_halves(record + Q4_1::m));
  for (int t = 0; t < N; ++t) {
    const __m512i s = dot_block(_mm512_setzero_si512(), w, x + t * kBlock);
    const __m512 offset = _mm512_mul_ps(m, _mm512_cvtepi32_ps(_mm512_set1_epi32(x_sum[t])));
    const __m512 value = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(s), offset);
    acc[t].v = _mm512_fmadd_ps(_mm512_set1_ps(x_scale[t]), value, acc[t].v);
  }
}

// The integer dots of one super-block, 6-bit scales applied.
template <int N>
SHOAL_INLINE void q4_k_dots(const uint8_t* record, const int8_t* x, __m512i* dots) {
  const __m512i low4 = _mm512_set1_epi8(15);
  for (int c = 0; c < 4; ++c) {
    const uint8_t* cells = record + Q4_K::quants + c * Q4_K::chunk;
    prefetch_weights(cells, Q4_K::chunk);
    for (int high = 0; high < 2; ++high, x += N * kBlock) {
      __m512i w[8];
      for (int j = 0; j < 8; ++j) {
        const __m512i raw = load_bytes(cells + j * kCellRow);
        w[j] = _mm512_and_si512(high ? _mm512_srli_epi16(raw, 4) : raw, low4);
      }
      const __m512i scale = _mm512_cvtepu8_epi32(_mm_load_si128(
          reinterpret_cast<const __m128i*>(record + Q4_K::scales + (2 * c + high) * kLanes)));
      for (int t = 0; t < N; ++t) {
        const __m512i s = dot_block(_mm512_setzero_si512(), w, x + t * kBlock);
        dots[t] = _mm512_add_epi32(dots[t], _mm512_mullo_epi32(s, scale));
      }
    }
  }
}

template <int N>
SHOAL_INLINE void add_super_block(const uint8_t* record, const int8_t* x, const float* x_scale,
                                  const int16_t* x_sums, Lanes* acc) {
  __m512i dots[N];
  for (int t = 0; t < N; ++t) dots[t] = _mm512_setzero_si512();
  prefetch_weights(record, Q4_K::quants);
  q4_k_dots<N>(record, x, dots);
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

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixAvx512 = SHOAL_MATRIX_KERNELS;
}
