// Row group kernels for AVX-512 with VNNI: one register is the 16 lanes, and vpdpbusd (the
// non-saturating form) takes four activations of a row as a broadcast from memory.
#include "matmul_avx512_parts.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 16;
constexpr int kIntTile = 16, kQ4KTile = 8;  // Q4_K keeps two registers a row: 16 would spill
constexpr int kRowsInRegisters = 8;

// Two groups share each broadcast of activations, as loads are two a cycle like products; but their
// weights leave no registers for sums, and that pays from 16 rows on.
constexpr int groups_at_once(int rows) { return rows >= 16 ? kMaxGroups : 1; }

constexpr int fetched_ahead(int rows, int bits) { return zen5_fetched_ahead(rows, bits); }

// N, hidden where unrolling a loop over the rows would spill the weights of several groups.
template <int N, int G>
SHOAL_INLINE int rolled() {
  int n = N;
  if (G > 1) asm("" : "+r"(n));
  return n;
}

// dots[g] = start + group g's 32 columns * x.  In two chains, as latencies fill the scheduler.
template <int G>
SHOAL_INLINE void dot_block(int32_t start, const __m512i (*w)[8], const int8_t* x, __m512i* dots) {
  __m512i second[G];
  for (int g = 0; g < G; ++g)
    dots[g] = _mm512_set1_epi32(start), second[g] = _mm512_setzero_si512();
  for (int j = 0; j < 4; ++j) {
    const __m512i v = broadcast4(x + 4 * j), v16 = broadcast4(x + 16 + 4 * j);
    for (int g = 0; g < G; ++g) {
      dots[g] = _mm512_dpbusd_epi32(dots[g], w[g][j], v);
      second[g] = _mm512_dpbusd_epi32(second[g], w[g][4 + j], v16);
    }
  }
  for (int g = 0; g < G; ++g) dots[g] = _mm512_add_epi32(dots[g], second[g]);
}

template <int N, class L, int G>
SHOAL_INLINE void add_block(L, Records<G> at, int b, const int8_t* x, const float* x_scale,
                            const int32_t* x_start, Lanes* acc) {
  __m512i w[G][8];
  __m512 d[G];
  for (int g = 0; g < G; ++g) {
    unpack(L{}, at[g] + L::quants + b * L::block_quants, w[g]);
    d[g] = _mm512_cvtph_ps(load_halves(at[g] + L::scales + b * 32));
  }
  for (int t = 0, n = rolled<N, G>(); t < n; ++t) {
    __m512i dots[G];
    dot_block<G>(x_start[t], w, x + t * kBlock, dots);
    for (int g = 0; g < G; ++g) add_dot(dots[g], d[g], x_scale[t], acc + g * N + t);
  }
}

template <int N, int G>
SHOAL_INLINE void add_block(Q4_1, Records<G> at, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  __m512i w[G][8];
  __m512 d[G], m[G];
  for (int g = 0; g < G; ++g) {
    unpack(Q4_1{}, at[g] + Q4_1::quants, w[g]);
    d[g] = _mm512_cvtph_ps(load_halves(at[g] + Q4_1::d));
    m[g] = _mm512_cvtph_ps(load_halves(at[g] + Q4_1::m));
  }
  for (int t = 0, n = rolled<N, G>(); t < n; ++t) {
    __m512i dots[G];
    dot_block<G>(0, w, x + t * kBlock, dots);
    for (int g = 0; g < G; ++g)
      add_offset_dot(dots[g], d[g], m[g], x_sum[t], x_scale[t], acc + g * N + t);
  }
}

// The integer dots of one super-block, 6-bit scales applied.
template <int N>
SHOAL_INLINE void q4_k_dots(const uint8_t* record, const int8_t* x, __m512i* dots) {
  for (int c = 0; c < 4; ++c) {
    prefetch_weights(record + Q4_K::quants + c * Q4_K::chunk, Q4_K::chunk, fetched_ahead(N, 4));
    for (int high = 0; high < 2; ++high, x += N * kBlock) {
      __m512i w[1][8], s;
      unpack_sub_block(record, c, high, w[0]);
      const __m512i scale = load_sub_scales(record, 2 * c + high);
      for (int t = 0; t < N; ++t) {
        dot_block<1>(0, w, x + t * kBlock, &s);
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
  prefetch_weights(record, Q4_K::quants, fetched_ahead(N, 4));
  q4_k_dots<N>(record, x, dots);
  q4_k_finish<N>(record, dots, x_scale, x_sums, acc);
}

}  // namespace
}  // namespace shoal

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixAvx512 = SHOAL_MATRIX_KERNELS;
}
