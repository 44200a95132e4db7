// Row group kernels for AVX2 with FMA and F16C.
//
// A register is half of the lanes.  Without vpdpbusd the dot product is vpmaddubsw (u8 x s8 -> s16
// pairs) then vpmaddwd (-> s32).  The s16 stage must not saturate: nibbles allow 8 products deep, 8
// * 2 * 15 * 127 = 30480 < 32768; bytes do not, so those of Q8_0 are taken as two nibbles each.
//
// Multiplications of every kind share two ports of Zen, and loads are two a cycle.  So a broadcast
// of activations serves both halves, which leaves registers for 16 columns of weights: a tile's
// rows pass by twice a block, and the first pass's sums wait in L1 for the second.
#include "matmul_avx2_parts.h"

namespace shoal {
namespace {

// With few rows, lines are read as fast as they come, and hints in between cost: at one row 20 % of
// the bandwidth on one thread of a Zen 4.  More rows, or weights of fewer bits, leave the hardware
// too far behind.
constexpr int fetched_ahead(int rows, int bits) { return rows >= bits ? 4096 : 0; }

SHOAL_INLINE Ints add16(const Ints& a, const Ints& b) {
  return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
}
// Left alone, the compiler forms all products of a sum, spills them, and adds them as a tree.
SHOAL_INLINE void settle(Ints* s) { asm("" : "+x"(s->low), "+x"(s->high)); }

SHOAL_INLINE Ints multiply(const Ints& w, __m256i x) {
  return {_mm256_maddubs_epi16(w.low, x), _mm256_maddubs_epi16(w.high, x)};
}

// Pair sums with 16 values.
SHOAL_INLINE Ints dot16(const Quad& q, const int8_t* x) {
  Ints first = add16(multiply(q.w[0], broadcast4(x)), multiply(q.w[1], broadcast4(x + 4)));
  settle(&first);
  Ints second = add16(multiply(q.w[2], broadcast4(x + 8)), multiply(q.w[3], broadcast4(x + 12)));
  settle(&second);
  return add16(first, second);
}

// Calls take(t, pair sums of row t) for 32 columns: four cell rows at `cells`, shifted by `shift`,
// then four at `cells2`, shifted by `shift2`.
template <int N, class F>
SHOAL_INLINE void dot32(const uint8_t* cells, int shift, const uint8_t* cells2, int shift2,
                        const int8_t* x, F&& take) {
  Ints pairs[N];
  asm("" : "+r"(cells), "+r"(cells2));  // or bytes loaded twice are kept, in memory
  const Quad first = load_quad(cells, shift);
  for (int t = 0, n = rolled<N>(); t < n; ++t) pairs[t] = dot16(first, x + t * kBlock);
  const Quad second = load_quad(cells2, shift2);
  for (int t = 0, n = rolled<N>(); t < n; ++t)
    take(t, add16(pairs[t], dot16(second, x + t * kBlock + 16)));
}

// Up to two rows keep their sums in registers and meet each cell row once: low[t] becomes the pair
// sums of `Count` cell rows' low nibbles with x of row t, high[t] those of the high ones with
// x_high.
template <int N, int Count>
SHOAL_INLINE void dot_few(const uint8_t* cells, const int8_t* x, const int8_t* x_high, Ints* low,
                          Ints* high) {
  for (int j = 0; j < Count; ++j) {
    const Ints w = nibbles(cells + j * kCellRow, 0), w16 = nibbles(cells + j * kCellRow, 4);
    for (int t = 0; t < N; ++t) {
      const int at = t * kBlock + 4 * j;
      const __m256i v = broadcast4(x + at), v16 = broadcast4(x_high + at);
      low[t] = j == 0 ? multiply(w, v) : add16(low[t], multiply(w, v));
      settle(&low[t]);
      high[t] = j == 0 ? multiply(w16, v16) : add16(high[t], multiply(w16, v16));
      settle(&high[t]);
    }
  }
}

// Pair sums of a block of nibbles whose first 16 columns are the low ones.
template <int N>
SHOAL_INLINE void dot_nibbles(const uint8_t* cells, const int8_t* x, Ints* pairs) {
  if constexpr (N <= kRowsInRegisters) {
    Ints high[N];
    dot_few<N, 4>(cells, x, x + 16, pairs, high);
    for (int t = 0; t < N; ++t) pairs[t] = add16(pairs[t], high[t]);
  } else {
    dot32<N>(cells, 0, cells, 4, x, [&](int t, const Ints& s) { pairs[t] = s; });
  }
}

template <int N>
SHOAL_INLINE void add_block(Q4_0, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  const uint8_t* cells = record + Q4_0::quants + b * Q4_0::block_quants;
  Ints pairs[N];
  dot_nibbles<N>(cells, x, pairs);
  const Lanes d = load_scales(record + Q4_0::scales + b * 32);
  for (int t = 0, n = rolled<N>(); t < n; ++t) {
    const Ints s = add32(sum_pairs(pairs[t], 1), set32(x_start + t));
    acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]);
  }
}

template <int N>
SHOAL_INLINE void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  const uint8_t* cells = record + Q4_1::quants;
  Ints pairs[N];
  dot_nibbles<N>(cells, x, pairs);
  const Lanes d = load_scales(record + Q4_1::d), m = load_scales(record + Q4_1::m);
  for (int t = 0, n = rolled<N>(); t < n; ++t) {
    const Lanes offset = mul(m, to_floats(set32(x_sum + t)));
    acc[t] = fma(set1(x_scale[t]), fma(d, to_floats(sum_pairs(pairs[t], 1)), offset), acc[t]);
  }
}

// Sums with 16 values; levels allow two products deep in 16 bits.
SHOAL_INLINE Ints level_dot16(const Quad& q, const int8_t* x) {
  Ints first = add16(multiply(q.w[0], broadcast4(x)), multiply(q.w[1], broadcast4(x + 4)));
  settle(&first);
  Ints second = add16(multiply(q.w[2], broadcast4(x + 8)), multiply(q.w[3], broadcast4(x + 12)));
  settle(&second);
  return add32(sum_pairs(first, 1), sum_pairs(second, 1));
}

template <int N, class L>
SHOAL_INLINE void add_table_block(L, const uint8_t* record, int b, const int8_t* x,
                                  const float* x_scale, const int32_t* x_start, Lanes* acc) {
  const uint8_t *cells = record + L::quants + b * L::block_quants, *again = cells;
  asm("" : "+r"(cells), "+r"(again));  // or bytes loaded twice are kept, in memory
  Ints dots[N];
  const Quad first = load_levels(L{}, cells, 0);
  for (int t = 0, n = rolled<N>(); t < n; ++t)
    dots[t] = add32(level_dot16(first, x + t * kBlock), set32(x_start + t));
  const Quad second = load_levels(L{}, again, 1);
  const Lanes d = load_scales(record + L::scales + b * 32);
  for (int t = 0, n = rolled<N>(); t < n; ++t) {
    const Ints s = add32(dots[t], level_dot16(second, x + t * kBlock + 16));
    acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]);
  }
}

template <int N>
SHOAL_INLINE void add_block(Q4_T, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  add_table_block<N>(Q4_T{}, record, b, x, x_scale, x_start, acc);
}

template <int N>
SHOAL_INLINE void add_block(Q3_T, const uint8_t* record, int b, const int8_t* x,
                            const float* x_scale, const int32_t* x_start, Lanes* acc) {
  add_table_block<N>(Q3_T{}, record, b, x, x_scale, x_start, acc);
}

// The dot products of a block of bytes with one row, of G groups.  Signed weights as |w| * (x with
// w's sign): an instruction less a byte than two nibbles each, but more of those on the two ports
// that multiply, so not for more rows.  128 * 127 * 2 = 32512: one product deep in 16 bits.
template <int G>
SHOAL_INLINE void dot_bytes(Records<G> cells, const int8_t* x, Ints* sums) {
  const __m256i offset = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1);
  const auto products = [&](const uint8_t* at, __m256i v) {
    const __m256i w = _mm256_xor_si256(load_bytes(at), offset);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(v, w)),
                             ones);
  };
  for (int g = 0; g < G; ++g) sums[g] = zero_ints();
  for (int j = 0; j < 8; ++j) {
    const __m256i v = broadcast4(x + 4 * j);
    for (int g = 0; g < G; ++g) {
      const uint8_t* const row = cells[g] + j * kCellRow;
      sums[g] = add32(sums[g], Ints{products(row, v), products(row + 32, v)});
      settle(&sums[g]);
    }
  }
}

// acc[g] += one row's product with block b of group g's record.
template <int G>
SHOAL_INLINE void add_bytes(Records<G> at, int b, const int8_t* x, float x_scale, Lanes* acc) {
  Ints dots[G];
  const uint8_t* const cells = at.first + Q8_0::quants + b * Q8_0::block_quants;
  dot_bytes(Records<G>{cells, at.stride}, x, dots);
  for (int g = 0; g < G; ++g) {
    const Lanes d = load_scales(at[g] + Q8_0::scales + b * 32);
    acc[g] = fma(to_floats(dots[g]), mul(d, set1(x_scale)), acc[g]);
  }
}

// One row may meet two groups: see matmul_walks.
template <int N, int G>
SHOAL_INLINE void add_block(Q8_0, Records<G> at, int b, const int8_t* x, const float* x_scale,
                            const int32_t* x_start, Lanes* acc) {
  if constexpr (N == 1) {
    add_bytes(at, b, x, x_scale[0], acc);
    return;
  }
  const uint8_t* const record = at.first;
  const uint8_t* cells = record + Q8_0::quants + b * Q8_0::block_quants;
  const uint8_t* cells2 = cells + 4 * kCellRow;
  Ints low[N], high[N];
  if constexpr (N <= kRowsInRegisters) {
    dot_few<N, 8>(cells, x, x, low, high);
  } else {
    dot32<N>(cells, 0, cells2, 0, x, [&](int t, const Ints& s) { low[t] = s; });
    dot32<N>(cells, 4, cells2, 4, x, [&](int t, const Ints& s) { high[t] = s; });
  }
  const Lanes d = load_scales(record + Q8_0::scales + b * 32);
  for (int t = 0, n = rolled<N>(); t < n; ++t) {
    const Ints dot = add32(sum_pairs(low[t], 1), sum_pairs(high[t], 16));
    acc[t] = fma(to_floats(add32(dot, set32(x_start + t))), mul(d, set1(x_scale[t])), acc[t]);
  }
}

// A sub-block's scales, each in both 16-bit parts of its cell.
SHOAL_INLINE Ints load_scale_pairs(const uint8_t* record, int sub_block) {
  const Ints s = load_sub_scales(record, sub_block);
  return {_mm256_or_si256(s.low, _mm256_slli_epi32(s.low, 16)),
          _mm256_or_si256(s.high, _mm256_slli_epi32(s.high, 16))};
}

// dots[t] += the scaled dot of sub-block 2c (Shift 0) or 2c + 1 (Shift 4).  The 6-bit scale rides
// on the s16 -> s32 step.
template <int N, int Shift>
SHOAL_INLINE void q4_k_sub_block(const uint8_t* record, int c, const int8_t* x, Ints* dots) {
  const uint8_t* cells = record + Q4_K::quants + c * Q4_K::chunk;
  const Ints scale = load_scale_pairs(record, 2 * c + Shift / 4);
  dot32<N>(cells, Shift, cells + 4 * kCellRow, Shift, x, [&](int t, const Ints& s) {
    Ints sum = sum_pairs(s, scale);
    if (c + Shift > 0) sum = add32(dots[t], sum);
    dots[t].low = sum.low, dots[t].high = sum.high;  // as a struct: four halves, through memory
  });
}

// Chunk c of a super-block, for up to two rows: both sub-blocks at once.
template <int N>
SHOAL_INLINE void q4_k_chunk_few(const uint8_t* record, int c, const int8_t* x, Ints* dots) {
  Ints low[N], high[N];
  dot_few<N, 8>(record + Q4_K::quants + c * Q4_K::chunk, x, x + N * kBlock, low, high);
  const Ints scale = load_scale_pairs(record, 2 * c), scale16 = load_scale_pairs(record, 2 * c + 1);
  for (int t = 0; t < N; ++t) {
    const Ints sum = add32(sum_pairs(low[t], scale), sum_pairs(high[t], scale16));
    dots[t] = c == 0 ? sum : add32(dots[t], sum);
  }
}

template <int N>
SHOAL_INLINE void add_super_block(const uint8_t* record, const int8_t* x, const float* x_scale,
                                  const int16_t* x_sums, Lanes* acc) {
  Ints dots[N];
  fetch_header(record, fetched_ahead(N, 4));
  for (int c = 0; c < 4; ++c, x += 2 * N * kBlock) {
    fetch_chunk(record, c, fetched_ahead(N, 4));
    if constexpr (N <= kRowsInRegisters) {
      q4_k_chunk_few<N>(record, c, x, dots);
    } else {
      q4_k_sub_block<N, 0>(record, c, x, dots);
      q4_k_sub_block<N, 4>(record, c, x + N * kBlock, dots);
    }
  }
  q4_k_finish<N>(record, dots, x_scale, x_sums, acc);
}

}  // namespace
}  // namespace shoal

#include "matmul_tiles.h"

namespace shoal {
namespace {

// Groups of a walk from which on it is worth being two: the hardware begins anew every 4 KiB, and
// has another stream to go on with meanwhile.  Two groups side by side would each be left after
// some KB: slower than one.
constexpr int kTwoWalks = 16;

void one_row_two_walks(const uint8_t* groups, int count, int lanes, int cols, const Tile& tile,
                       const float* bias, float* out) {
  const int64_t stride = group_bytes(Format::q8_0, cols);
  const int half = count / 2, blocks = (cols + kBlock - 1) / kBlock;
  for (int g = 0; g < half; ++g) {
    const int first[2] = {g * kLanes, (half + g) * kLanes};
    Lanes acc[2] = {start_of(bias, first[0], lanes), start_of(bias, first[1], lanes)};
    block_kernel<Q8_0, 1>(Records<2>{groups + g * stride, half * stride}, blocks, tile, acc);
    for (int i = 0; i < 2; ++i) store_lanes(out, acc[i], first[i], lanes);
  }
  if (count % 2 == 1) {
    const int first = 2 * half * kLanes;
    matmul_tile(Format::q8_0, groups + 2 * half * stride, 1, lanes - first, cols, tile, 1,
                bias == nullptr ? nullptr : bias + first, out + first, 0);
  }
}

void matmul_walks(Format format, const uint8_t* groups, int count, int lanes, int cols,
                  const Tile& tile, int n, const float* bias, float* out, int64_t out_stride) {
  if (format == Format::q8_0 && n == 1 && count >= kTwoWalks)
    one_row_two_walks(groups, count, lanes, cols, tile, bias, out);
  else
    matmul_tile(format, groups, count, lanes, cols, tile, n, bias, out, out_stride);
}

}  // namespace

const MatrixKernels kMatrixAvx2 = {SHOAL_MAX_TILES, matmul_walks, gate_up_tile, down_sums_tile};

}  // namespace shoal
