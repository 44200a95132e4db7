// Row group kernels for AVX2 with AVX-VNNI: CPUs that have vpdpbusd for registers of 256 bits, but
// not AVX-512.  Four products and their sum, exact, in one instruction; all else is AVX2's.
//
// A broadcast of activations serves both halves of the lanes, 16 columns of weights fill the
// registers: a tile's rows pass by twice a block, as with AVX2.
#include "matmul_avx2_parts.h"

namespace shoal {
namespace {

constexpr int fetched_ahead(int rows, int bits) { return zen5_fetched_ahead(rows, bits); }

// The bytes of 16 columns: of the first or the second half of a block.
SHOAL_INLINE Quad load_half(Q4_0, const uint8_t* cells, int half) {
  return load_quad(cells, 4 * half);
}
SHOAL_INLINE Quad load_half(Q4_1, const uint8_t* cells, int half) {
  return load_quad(cells, 4 * half);
}
SHOAL_INLINE Quad load_half(Q8_0, const uint8_t* cells, int half) {
  Quad q;
  for (int j = 0; j < 4; ++j) {
    const uint8_t* const row = cells + (4 * half + j) * kCellRow;
    q.w[j] = {load_bytes(row), load_bytes(row + 32)};
  }
  return q;
}
template <class L>
SHOAL_INLINE Quad load_half(L, const uint8_t* cells, int half) {
  return load_levels(L{}, cells, half);
}

// sums += the dots of 16 columns with x.
SHOAL_INLINE Ints add_dot16(Ints sums, const Quad& q, const int8_t* x) {
  for (int j = 0; j < 4; ++j) {
    const __m256i v = broadcast4(x + 4 * j);
    sums.low = _mm256_dpbusd_avx_epi32(sums.low, q.w[j].low, v);
    sums.high = _mm256_dpbusd_avx_epi32(sums.high, q.w[j].high, v);
  }
  return sums;
}

// Calls take(t, start(t) + dots of 32 columns with row t).  load(half) returns 16 of them.
template <int N, class Load, class Start, class Take>
SHOAL_INLINE void dot32(const int8_t* x, Load&& load, Start&& start, Take&& take) {
  Ints dots[N];
  const Quad first = load(0);
  for (int t = 0, n = rolled<N>(); t < n; ++t) dots[t] = add_dot16(start(t), first, x + t * kBlock);
  if (N > kRowsInRegisters) asm("" ::: "memory");  // or bytes loaded twice are kept, in memory
  const Quad second = load(1);
  for (int t = 0, n = rolled<N>(); t < n; ++t)
    take(t, add_dot16(dots[t], second, x + t * kBlock + 16));
}

template <int N, class L>
SHOAL_INLINE void add_block(L, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                            const int32_t* x_start, Lanes* acc) {
  const uint8_t* const cells = record + L::quants + b * L::block_quants;
  const Lanes d = load_scales(record + L::scales + b * 32);
  dot32<N>(
      x, [&](int half) { return load_half(L{}, cells, half); },
      [&](int t) { return set32(x_start + t); },
      [&](int t, const Ints& s) { acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]); });
}

template <int N>
SHOAL_INLINE void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  const Lanes d = load_scales(record + Q4_1::d), m = load_scales(record + Q4_1::m);
  dot32<N>(
      x, [&](int half) { return load_half(Q4_1{}, record + Q4_1::quants, half); },
      [](int) { return zero_ints(); },
      [&](int t, const Ints& s) {
        const Lanes offset = mul(m, to_floats(set32(x_sum + t)));
        acc[t] = fma(set1(x_scale[t]), fma(d, to_floats(s), offset), acc[t]);
      });
}

// dots[t] += sub-block 2c's (high 0) or 2c + 1's (high 1) dot, scaled.
template <int N>
SHOAL_INLINE void add_sub_block(const uint8_t* record, int c, int high, const int8_t* x,
                                Ints* dots) {
  const uint8_t* const cells = record + Q4_K::quants + c * Q4_K::chunk;
  const Ints scale = load_sub_scales(record, 2 * c + high);
  dot32<N>(
      x, [&](int half) { return load_quad(cells + 4 * half * kCellRow, 4 * high); },
      [](int) { return zero_ints(); },
      [&](int t, const Ints& s) {
        const Ints scaled = {_mm256_mullo_epi32(s.low, scale.low),
                             _mm256_mullo_epi32(s.high, scale.high)};
        const Ints sum = c + high > 0 ? add32(dots[t], scaled) : scaled;
        dots[t].low = sum.low, dots[t].high = sum.high;  // as a struct: through memory, in halves
      });
}

template <int N>
SHOAL_INLINE void add_super_block(const uint8_t* record, const int8_t* x, const float* x_scale,
                                  const int16_t* x_sums, Lanes* acc) {
  Ints dots[N];
  fetch_header(record, fetched_ahead(N, 4));
  for (int c = 0; c < 4; ++c) {
    fetch_chunk(record, c, fetched_ahead(N, 4));
    for (int high = 0; high < 2; ++high, x += N * kBlock)
      add_sub_block<N>(record, c, high, x, dots);
  }
  q4_k_finish<N>(record, dots, x_scale, x_sums, acc);
}

}  // namespace
}  // namespace shoal

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixAvxVnni = SHOAL_MATRIX_KERNELS;
}
