// Row group kernels for AVX2 with FMA and F16C.
//
// A register is half of the lanes.  Without vpdpbusd the dot product is vpmaddubsw (u8 x s8 -> s16
// pairs) then vpmaddwd (-> s32).  The s16 stage must not saturate: nibbles allow 8 products deep, 8
// * 2 * 15 * 127 = 30480 < 32768; bytes do not, so Q8_0 multiplies |w| by x with w's sign: 2 * 128
// * 127 = 32512 < 32768.
#include <cstring>

#include "lanes_avx2.h"
#include "matmul.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 4;  // of two registers each, beside 2 of weights and 1 of x
constexpr int kIntTile = 16, kQ4KTile = 16;

// 4 KiB ahead: 13-26 % for the 4-bit formats at one row (prototype, Zen 5).
SHOAL_INLINE void prefetch(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p) + 4096 + i, _MM_HINT_T0);
}

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

// Lanes 0-7 (half 0) or 8-15 (half 1), or with H = 2 both, of N accumulators.
template <int N, int H>
SHOAL_INLINE void get_halves(const Lanes* from, int half, __m256* acc) {
  for (int h = 0; h < H; ++h)
    for (int t = 0; t < N; ++t) acc[h * N + t] = half + h ? from[t].high : from[t].low;
}
template <int N, int H>
SHOAL_INLINE void put_halves(Lanes* to, int half, const __m256* acc) {
  for (int h = 0; h < H; ++h) {
    for (int t = 0; t < N; ++t) {
      if (half + h)
        to[t].high = acc[h * N + t];
      else
        to[t].low = acc[h * N + t];
    }
  }
}

// 8 x 32 nibbles: 4 cell rows of 8 lanes; w[j] the low and w[4 + j] the high nibbles of row j.
SHOAL_INLINE void unpack_nibbles(const uint8_t* cells, __m256i* w) {
  const __m256i low4 = _mm256_set1_epi8(15);
  for (int j = 0; j < 4; ++j) {
    const __m256i raw = load_bytes(cells + j * kCellRow);
    w[j] = _mm256_and_si256(raw, low4);
    w[4 + j] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low4);
  }
}
// Pair sums of 32 products, in 16 bits.
SHOAL_INLINE __m256i dot_nibbles(const __m256i* w, const int8_t* x) {
  __m256i s = _mm256_maddubs_epi16(w[0], broadcast4(x));
  for (int j = 1; j < 8; ++j)
    s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w[j], broadcast4(x + 4 * j)));
  return s;
}

// Block b of a record.
template <int N>
SHOAL_INLINE void q4_0_block(const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                             const int32_t* x_start, int half, __m256* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i w[8];
  unpack_nibbles(record + Q4_0::quants + b * Q4_0::block_quants + half * 32, w);
  const __m256 d = _mm256_cvtph_ps(load_halves(record + Q4_0::scales + b * 32 + half * 16));
  for (int t = 0; t < N; ++t) {
    const __m256i s = _mm256_add_epi32(_mm256_madd_epi16(dot_nibbles(w, x + t * kBlock), ones),
                                       broadcast4(x_start + t));
    acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_mul_ps(d, _mm256_set1_ps(x_scale[t])),
                             acc[t]);
  }
}

template <int N, int H>
SHOAL_INLINE void q4_0_walk(const uint8_t* record, int blocks, const Tile& tile, int half,
                            Lanes* out) {
  const int8_t* x = tile.quants;
  const float* x_scale = tile.scales;
  const int32_t* x_start = tile.start;
  __m256 acc[H * N];
  get_halves<N, H>(out, half, acc);
  for (; blocks >= 2; blocks -= 2, record += Q4_0::record) {
    if (half == 0) prefetch(record, Q4_0::record);
    for (int b = 0; b < 2; ++b, x += N * kBlock, x_scale += N, x_start += N)
      for (int h = 0; h < H; ++h)
        q4_0_block<N>(record, b, x, x_scale, x_start, half + h, acc + h * N);
  }
  if (blocks == 1)
    for (int h = 0; h < H; ++h)
      q4_0_block<N>(record, 0, x, x_scale, x_start, half + h, acc + h * N);
  put_halves<N, H>(out, half, acc);
}

template <int N>
SHOAL_INLINE void q4_1_block(const uint8_t* record, const int8_t* x, const float* x_scale,
                             const int32_t* x_sum, int half, __m256* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i w[8];
  unpack_nibbles(record + Q4_1::quants + half * 32, w);
  const __m256 d = _mm256_cvtph_ps(load_halves(record + Q4_1::d + half * 16));
  const __m256 m = _mm256_cvtph_ps(load_halves(record + Q4_1::m + half * 16));
  for (int t = 0; t < N; ++t) {
    const __m256i s = _mm256_madd_epi16(dot_nibbles(w, x + t * kBlock), ones);
    const __m256 offset = _mm256_mul_ps(m, _mm256_cvtepi32_ps(broadcast4(x_sum + t)));
    const __m256 value = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(s), offset);
    acc[t] = _mm256_fmadd_ps(_mm256_set1_ps(x_scale[t]), value, acc[t]);
  }
}

template <int N, int H>
SHOAL_INLINE void q4_1_walk(const uint8_t* record, int blocks, const Tile& tile, int half,
                            Lanes* out) {
  const int8_t* x = tile.quants;
  const float* x_scale = tile.scales;
  const int32_t* x_sum = tile.start;
  __m256 acc[H * N];
  get_halves<N, H>(out, half, acc);
  for (; blocks > 0; --blocks, record += Q4_1::record, x += N * kBlock, x_scale += N, x_sum += N) {
    if (half == 0) prefetch(record, Q4_1::record);
    for (int h = 0; h < H; ++h) q4_1_block<N>(record, x, x_scale, x_sum, half + h, acc + h * N);
  }
  put_halves<N, H>(out, half, acc);
}

// Block b of a record.  Stored bytes are w + 128; here they are flipped back to signed, so
// tile.start is not used.
template <int N>
SHOAL_INLINE void q8_0_block(const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                             int half, __m256* acc) {
  const __m256i flip = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
  const uint8_t* cells = record + Q8_0::quants + b * Q8_0::block_quants + half * 32;
  __m256i s[N];
  for (int t = 0; t < N; ++t) s[t] = _mm256_setzero_si256();
  for (int j = 0; j < 8; ++j) {
    const __m256i w = _mm256_xor_si256(load_bytes(cells + j * kCellRow), flip);
    const __m256i magnitude = _mm256_abs_epi8(w);
    for (int t = 0; t < N; ++t) {
      const __m256i signed_x = _mm256_sign_epi8(broadcast4(x + t * kBlock + 4 * j), w);
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
      s[t] = _mm256_add_epi32(s[t], _mm256_madd_epi16(pairs, ones));
    }
  }
  const __m256 d = _mm256_cvtph_ps(load_halves(record + Q8_0::scales + b * 32 + half * 16));
  for (int t = 0; t < N; ++t)
    acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[t]), _mm256_mul_ps(d, _mm256_set1_ps(x_scale[t])),
                             acc[t]);
}

template <int N, int H>
SHOAL_INLINE void q8_0_walk(const uint8_t* record, int blocks, const Tile& tile, int half,
                            Lanes* out) {
  const int8_t* x = tile.quants;
  const float* x_scale = tile.scales;
  __m256 acc[H * N];
  get_halves<N, H>(out, half, acc);
  for (; blocks >= 2; blocks -= 2, record += Q8_0::record) {
    if (half == 0) prefetch(record, Q8_0::record);
    for (int b = 0; b < 2; ++b, x += N * kBlock, x_scale += N)
      for (int h = 0; h < H; ++h) q8_0_block<N>(record, b, x, x_scale, half + h, acc + h * N);
  }
  if (blocks == 1)
    for (int h = 0; h < H; ++h) q8_0_block<N>(record, 0, x, x_scale, half + h, acc + h * N);
  put_halves<N, H>(out, half, acc);
}

// One quarter of a super-block: sub-blocks 2c and 2c + 1.  The 6-bit scale rides on the s16 -> s32
// step: vpmaddwd with the scale in both halves of a lane.
template <int N>
SHOAL_INLINE void q4_k_chunk(const uint8_t* record, int c, const int8_t* x, int half,
                             __m256i* dots) {
  const __m256i low4 = _mm256_set1_epi8(15);
  const uint8_t* cells = record + Q4_K::quants + c * Q4_K::chunk + half * 32;
  for (int high = 0; high < 2; ++high, x += N * kBlock) {
    __m256i w[8];
    for (int j = 0; j < 8; ++j) {
      const __m256i raw = load_bytes(cells + j * kCellRow);
      w[j] = _mm256_and_si256(high ? _mm256_srli_epi16(raw, 4) : raw, low4);
    }
    const __m128i scale8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(
        record + Q4_K::scales + (2 * c + high) * kLanes + half * 8));
    const __m256i scale32 = _mm256_cvtepu8_epi32(scale8);
    const __m256i scale = _mm256_or_si256(scale32, _mm256_slli_epi32(scale32, 16));
    for (int t = 0; t < N; ++t)
      dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(dot_nibbles(w, x + t * kBlock), scale));
  }
}

// Floats appear once per super-block.
template <int N>
SHOAL_INLINE void q4_k_finish(const uint8_t* record, const __m256i* dots, const float* x_scale,
                              const int16_t* x_sums, int half, __m256* acc) {
  const __m256 d = _mm256_cvtph_ps(load_halves(record + Q4_K::d + half * 16));
  const __m256 dmin = _mm256_cvtph_ps(load_halves(record + Q4_K::dmin + half * 16));
  __m256i min[4];
  for (int c = 0; c < 4; ++c)
    min[c] = _mm256_cvtepu8_epi16(load_halves(record + Q4_K::mins + c * 32 + half * 16));
  for (int t = 0; t < N; ++t) {
    __m256i mins = _mm256_madd_epi16(min[0], broadcast4(x_sums + t * 8));
    for (int c = 1; c < 4; ++c)
      mins = _mm256_add_epi32(mins, _mm256_madd_epi16(min[c], broadcast4(x_sums + t * 8 + 2 * c)));
    const __m256 offset = _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(mins));
    const __m256 value = _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(dots[t]), offset);
    acc[t] = _mm256_fmadd_ps(_mm256_set1_ps(x_scale[t]), value, acc[t]);
  }
}

template <int N, int H>
SHOAL_INLINE void q4_k_walk(const uint8_t* record, int blocks, const Tile& tile, int half,
                            Lanes* out) {
  const int8_t* x = tile.quants;
  const float* x_scale = tile.scales;
  const int16_t* x_sums = tile.sums;
  __m256 acc[H * N];
  get_halves<N, H>(out, half, acc);
  for (; blocks > 0; --blocks, record += Q4_K::record, x_scale += N, x_sums += N * 8) {
    __m256i dots[H * N];
    for (int t = 0; t < H * N; ++t) dots[t] = _mm256_setzero_si256();
    if (half == 0) prefetch(record, Q4_K::quants);
    for (int c = 0; c < 4; ++c, x += 2 * N * kBlock) {
      if (half == 0) prefetch(record + Q4_K::quants + c * Q4_K::chunk, Q4_K::chunk);
      for (int h = 0; h < H; ++h) q4_k_chunk<N>(record, c, x, half + h, dots + h * N);
    }
    for (int h = 0; h < H; ++h)
      q4_k_finish<N>(record, dots + h * N, x_scale, x_sums, half + h, acc + h * N);
  }
  put_halves<N, H>(out, half, acc);
}

// Up to two rows, both halves of a record are used while it is in L1: an even stream from memory.
// More rows need the registers: the group is walked twice, lanes 0-7 then 8-15.
#define SHOAL_WALK(walk)                                                                      \
  template <int N>                                                                            \
  SHOAL_INLINE void walk##_kernel(const uint8_t* group, int blocks, const Tile& tile,         \
                                  Lanes* acc) {                                               \
    if (N <= 2) {                                                                             \
      walk##_walk<N, 2>(group, blocks, tile, 0, acc);                                         \
    } else {                                                                                  \
      for (int half = 0; half < 2; ++half) walk##_walk<N, 1>(group, blocks, tile, half, acc); \
    }                                                                                         \
  }
SHOAL_WALK(q4_0)
SHOAL_WALK(q4_1)
SHOAL_WALK(q8_0)
SHOAL_WALK(q4_k)

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

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixAvx2 = SHOAL_MATRIX_KERNELS;
}
