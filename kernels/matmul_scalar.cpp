// Row group kernels in portable C++: the definition of every result, and the path of CPUs for which
// there is no other.  The inner loops run over the lanes, so that compilers can vectorise them.
#include <cstring>

#include "lanes_scalar.h"
#include "matmul.h"

namespace shoal {
namespace {

constexpr int kFloatAccumulators = 1;
constexpr int kIntTile = 8, kQ4KTile = 8;
constexpr int kRowsInRegisters = 0;
constexpr int groups_at_once(int) { return 1; }
constexpr int fetched_ahead(int, int) { return 4096; }

struct Ints {
  int32_t v[kLanes];
};

SHOAL_INLINE Ints set_ints(int32_t x) {
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = x;
  return r;
}
SHOAL_INLINE Lanes to_floats(const Ints& a) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = float(a.v[i]);
  return r;
}
SHOAL_INLINE Lanes load_scales(const uint8_t* p) {
  return load_half(reinterpret_cast<const uint16_t*>(p));
}

// s[lane] += the four bytes of the lane's cell, shifted and masked, times x[0..3].
SHOAL_INLINE void dot_cells(const uint8_t* cells, int shift, int mask, const int8_t* x, Ints* s) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < kCell; ++i) s->v[lane] += (cells[lane * kCell + i] >> shift & mask) * x[i];
}

// 32 values whose k = 4j + i is the low and k = 16 + 4j + i the high nibble of byte i of cell row
// j.
SHOAL_INLINE void dot_nibbles(const uint8_t* cells, const int8_t* x, Ints* s) {
  for (int j = 0; j < 4; ++j) {
    dot_cells(cells + j * kCellRow, 0, 15, x + 4 * j, s);
    dot_cells(cells + j * kCellRow, 4, 15, x + 16 + 4 * j, s);
  }
}

template <int N>
void add_block(Q4_0, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
               const int32_t* x_start, Lanes* acc) {
  const Lanes d = load_scales(record + Q4_0::scales + b * 32);
  for (int t = 0; t < N; ++t) {
    Ints s = set_ints(x_start[t]);
    dot_nibbles(record + Q4_0::quants + b * Q4_0::block_quants, x + t * kBlock, &s);
    acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]);
  }
}

// The codes of cell row c of 32 columns, as bytes.  Q4_T: nibbles as Q4_0.  Q3_T: three cell rows;
// a byte of row r holds codes 2r and 2r + 1 in its low six bits, the two top bits of the three make
// up codes 6 and 7 (docs/formats/kernel-layout.md).
SHOAL_INLINE int code_at(Q4_T, const uint8_t* cells, int c, int i) {
  return cells[c % 4 * kCellRow + i] >> c / 4 * 4 & 15;
}
SHOAL_INLINE int code_at(Q3_T, const uint8_t* cells, int c, int i) {
  if (c < 6) return cells[c / 2 * kCellRow + i] >> c % 2 * 3 & 7;
  const int low = cells[(c - 6) * 2 * kCellRow + i] >> 6, high = cells[kCellRow + i] >> c & 1;
  return high << 2 | low;
}
SHOAL_INLINE const uint8_t* levels_of(Q4_T) { return kLevels4; }
SHOAL_INLINE const uint8_t* levels_of(Q3_T) { return kLevels3; }

template <int N, class L>
void add_table_block(L, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                     const int32_t* x_start, Lanes* acc) {
  const uint8_t* cells = record + L::quants + b * L::block_quants;
  const Lanes d = load_scales(record + L::scales + b * 32);
  for (int t = 0; t < N; ++t) {
    Ints s = set_ints(x_start[t]);
    for (int c = 0; c < kBlock / kCell; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < kCell; ++i)
          s.v[lane] += levels_of(L{})[code_at(L{}, cells, c, lane * kCell + i)] *
                       x[t * kBlock + kCell * c + i];
    acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]);
  }
}

template <int N>
void add_block(Q4_T, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
               const int32_t* x_start, Lanes* acc) {
  add_table_block<N>(Q4_T{}, record, b, x, x_scale, x_start, acc);
}

template <int N>
void add_block(Q3_T, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
               const int32_t* x_start, Lanes* acc) {
  add_table_block<N>(Q3_T{}, record, b, x, x_scale, x_start, acc);
}

template <int N>
void add_block(Q8_0, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
               const int32_t* x_start, Lanes* acc) {
  const uint8_t* cells = record + Q8_0::quants + b * Q8_0::block_quants;
  const Lanes d = load_scales(record + Q8_0::scales + b * 32);
  for (int t = 0; t < N; ++t) {
    Ints s = set_ints(x_start[t]);
    for (int j = 0; j < 8; ++j) dot_cells(cells + j * kCellRow, 0, 255, x + t * kBlock + 4 * j, &s);
    acc[t] = fma(to_floats(s), mul(d, set1(x_scale[t])), acc[t]);
  }
}

template <int N>
void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
               const int32_t* x_sum, Lanes* acc) {
  const Lanes d = load_scales(record + Q4_1::d), m = load_scales(record + Q4_1::m);
  for (int t = 0; t < N; ++t) {
    Ints s = set_ints(0);
    dot_nibbles(record + Q4_1::quants, x + t * kBlock, &s);
    const Lanes offset = mul(m, set1(float(x_sum[t])));
    acc[t] = fma(set1(x_scale[t]), fma(d, to_floats(s), offset), acc[t]);
  }
}

// Scales and minimums are applied in int32 over the whole super-block (at most 256 * 15 * 127 * 63,
// below 2^25); floats appear once per super-block.
SHOAL_INLINE void q4_k_integers(const uint8_t* record, const int8_t* x, int x_stride,
                                const int16_t* x_sums, Ints* dots, Ints* mins) {
  for (int sub = 0; sub < 8; ++sub, x += x_stride) {
    const uint8_t* cells = record + Q4_K::quants + sub / 2 * Q4_K::chunk;
    Ints s = set_ints(0);
    for (int j = 0; j < 8; ++j) dot_cells(cells + j * kCellRow, 4 * (sub % 2), 15, x + 4 * j, &s);
    const uint8_t* scales = record + Q4_K::scales + sub * kLanes;
    const uint8_t* sub_mins = record + Q4_K::mins + sub / 2 * 32 + sub % 2;
    for (int i = 0; i < kLanes; ++i) dots->v[i] += s.v[i] * scales[i];
    for (int i = 0; i < kLanes; ++i) mins->v[i] += sub_mins[2 * i] * x_sums[sub];
  }
}

template <int N>
void add_super_block(const uint8_t* record, const int8_t* x, const float* x_scale,
                     const int16_t* x_sums, Lanes* acc) {
  const Lanes d = load_scales(record + Q4_K::d), dmin = load_scales(record + Q4_K::dmin);
  for (int t = 0; t < N; ++t) {
    Ints dots = set_ints(0), mins = set_ints(0);
    q4_k_integers(record, x + t * kBlock, N * kBlock, x_sums + t * 8, &dots, &mins);
    const Lanes value = fms(d, to_floats(dots), mul(dmin, to_floats(mins)));
    acc[t] = fma(set1(x_scale[t]), value, acc[t]);
  }
}

// In double, adding 1.5 * 2^52 leaves the rounded integer in the low mantissa bits; float -> double
// and the product with a power of two are exact.
bool add_quanta(int64_t* sums, const Lanes& y, float weight, double two_to_grid) {
  bool good = true;
  for (int i = 0; i < kLanes; ++i) {
    const float p = weight * y.v[i];
    const double v = double(p) * two_to_grid;
    if (!(__builtin_fabs(v) < 0x1p44)) {
      good = false;
      continue;
    }
    const double shifted = v + 0x1.8p52;
    int64_t bits;
    std::memcpy(&bits, &shifted, 8);
    sums[i] += bits - 0x4338000000000000;
  }
  return good;
}

}  // namespace
}  // namespace shoal

#include "matmul_tiles.h"

namespace shoal {
const MatrixKernels kMatrixScalar = SHOAL_MATRIX_KERNELS;
}
