// Row group kernels for AVX-512 with VNNI: one register is the 16 lanes, and vpdpbusd (the
// non-saturating form) takes four activations of a row as a broadcast from memory.
#include "matmul_avx512_parts.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 16;
constexpr int kIntTile = 16, kQ4KTile = 8;  // Q4_K keeps two registers a row: 16 would spill
constexpr int kRowsInRegisters = 16;

// 13-26 % for the 4-bit formats at one row (prototype, Zen 5).
constexpr bool fetches_ahead(int, int) { return true; }

SHOAL_INLINE __m512i dot_block(__m512i start, const __m512i* w, const int8_t* x) {
  for (int j = 0; j < 8; ++j) start = _mm512_dpbusd_epi32(start, w[j], broadcast4(x + 4 * j));
  return start;
}

template <int N, class L>
SHOAL_INLINE void add_block(L, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                            const int32_t* x_start, Lanes* acc) {
  __m512i w[8];
  unpack(L{}, record + L::quants + b * L::block_quants, w);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + L::scales + b * 32));
  for (int t = 0; t < N; ++t)
    add_dot(dot_block(_mm512_set1_epi32(x_start[t]), w, x + t * kBlock), d, x_scale[t], acc + t);
}

template <int N>
SHOAL_INLINE void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  __m512i w[8];
  unpack(Q4_1{}, record + Q4_1::quants, w);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_1::d));
  const __m512 m = _mm512_cvtph_ps(load_halves(record + Q4_1::m));
  for (int t = 0; t < N; ++t) {
    const __m512i s = dot_block(_mm512_setzero_si512(), w, x + t * kBlock);
    add_offset_dot(s, d, m, x_sum[t], x_scale[t], acc + t);
  }
}

// The integer dots of one super-block, 6-bit scales applied.
template <int N>
SHOAL_INLINE void q4_k_dots(const uint8_t* record, const int8_t* x, __m512i* dots) {
  for (int c = 0; c < 4; ++c) {
    prefetch_weights(record + Q4_K::quants + c * Q4_K::chunk, Q4_K::chunk);
    for (int high = 0; high < 2; ++high, x += N * kBlock) {
      __m512i w[8];
      unpack_sub_block(record, c, high, w);
      const __m512i scale = load_sub_scales(record, 2 * c + high);
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
  q4_k_finish<N>(record, dots, x_scale, x_sums, acc);
}

}  // namespace
}  // namespace shoal

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixAvx512 = SHOAL_MATRIX_KERNELS;
}
