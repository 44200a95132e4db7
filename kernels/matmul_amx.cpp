// Tiles of 16 rows on AMX, whose matrix unit multiplies 16 rows by 16 lanes by a block of columns
// in one instruction.  The cell rows of the kernel layout are what it takes as its second operand.
//
// Dots are exact, floats are AVX-512's: the bits are those of every other set.  Smaller tiles and
// float formats are AVX-512's altogether.
#include "matmul_avx512_parts.h"
#include "matmul_entries.h"

namespace shoal {
namespace {

constexpr int kRows = 16;
constexpr int kAhead = 4096;  // bytes of weights asked for in advance

// GCC's tile loads and stores do not say that they touch memory.
SHOAL_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// _tile_loadconfig's operand: bytes of a row and rows of each tile register.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "as the instruction reads it");

// Registers 0: sums, int32 [16 rows][16 lanes]; 1: activations [16 rows][32]; 2: eight cell rows.
// Released at a call's end: a thread whose tiles are in use costs each switch 8 KiB.
SHOAL_INLINE void configure_tiles() {
  TileShapes shapes;
  shapes.rows[0] = kRows, shapes.row_bytes[0] = kLanes * 4;
  shapes.rows[1] = kRows, shapes.row_bytes[1] = kBlock;
  shapes.rows[2] = kBlock / kCell, shapes.row_bytes[2] = kCellRow;
  settle_memory();
  _tile_loadconfig(&shapes);
}

// dots[t] = the dots of 16 lanes with row t, over the 32 columns whose bytes are w[8].
SHOAL_INLINE void multiply(const __m512i* w, const int8_t* x, __m512i* dots) {
  settle_memory();
  _tile_zero(0);
  _tile_loadd(1, x, kBlock);
  _tile_loadd(2, w, kCellRow);
  _tile_dpbsud(0, 1, 2);
  _tile_stored(0, dots, kLanes * 4);
  settle_memory();
}

template <class L>
SHOAL_INLINE void add_block(L, const uint8_t* record, int b, const int8_t* x, const float* x_scale,
                            const int32_t* x_start, Lanes* acc) {
  __m512i w[8], dots[kRows];
  unpack(L{}, record + L::quants + b * L::block_quants, w);
  multiply(w, x, dots);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + L::scales + b * 32));
  for (int t = 0; t < kRows; ++t)
    add_dot(_mm512_add_epi32(dots[t], _mm512_set1_epi32(x_start[t])), d, x_scale[t], acc + t);
}

SHOAL_INLINE void add_block(Q4_1, const uint8_t* record, int, const int8_t* x, const float* x_scale,
                            const int32_t* x_sum, Lanes* acc) {
  __m512i w[8], dots[kRows];
  unpack(Q4_1{}, record + Q4_1::quants, w);
  multiply(w, x, dots);
  const __m512 d = _mm512_cvtph_ps(load_halves(record + Q4_1::d));
  const __m512 m = _mm512_cvtph_ps(load_halves(record + Q4_1::m));
  for (int t = 0; t < kRows; ++t) add_offset_dot(dots[t], d, m, x_sum[t], x_scale[t], acc + t);
}

// acc[t] += row group * row t.
template <class L>
SHOAL_INLINE void add_group(L, const uint8_t* record, int cols, const Tile& tile, Lanes* acc) {
  for (int block = 0, blocks = (cols + kBlock - 1) / kBlock; block < blocks; ++block) {
    const int b = block % L::blocks;
    if (b == 0) prefetch_weights(record, L::record, kAhead);
    add_block(L{}, record, b, tile.quants + int64_t(block) * kRows * kBlock,
              tile.scales + block * kRows, tile.start + block * kRows, acc);
    if (b == L::blocks - 1) record += L::record;
  }
}

SHOAL_INLINE void add_group(Q4_K, const uint8_t* record, int cols, const Tile& tile, Lanes* acc) {
  const int8_t* x = tile.quants;
  const int blocks = (cols + kSuperBlock - 1) / kSuperBlock;
  for (int block = 0; block < blocks; ++block, record += Q4_K::record) {
    prefetch_weights(record, Q4_K::record, kAhead);
    __m512i w[8], dots[kRows], all[kRows];
    for (int sub = 0; sub < 8; ++sub, x += kRows * kBlock) {
      unpack_sub_block(record, sub / 2, sub % 2, w);
      multiply(w, x, dots);
      const __m512i scale = load_sub_scales(record, sub);
      for (int t = 0; t < kRows; ++t) {
        const __m512i scaled = _mm512_mullo_epi32(dots[t], scale);
        all[t] = sub == 0 ? scaled : _mm512_add_epi32(all[t], scaled);
      }
    }
    q4_k_finish<kRows>(record, all, tile.scales + block * kRows, tile.sums + block * kRows * 8,
                       acc);
  }
}

template <class L>
__attribute__((noinline)) void tile_kernel(const uint8_t* groups, int64_t stride, int count,
                                           int cols, const Tile& tile, Lanes* acc) {
  configure_tiles();
  for (; count > 0; --count, groups += stride, acc += kRows)
    add_group(L{}, groups, cols, tile, acc);
  _tile_release();
}

// Of tiles of 16 rows; null: AVX-512's.
GroupKernel kernel_of(Format format, int n) {
  if (n < kRows) return nullptr;
  switch (format) {
    case Format::q8_0:
      return tile_kernel<Q8_0>;
    case Format::q4_0:
      return tile_kernel<Q4_0>;
    case Format::q4_1:
      return tile_kernel<Q4_1>;
    case Format::q4_k:
      return tile_kernel<Q4_K>;
    case Format::q4_t:
      return tile_kernel<Q4_T>;
    case Format::q3_t:
      return tile_kernel<Q3_T>;
    default:
      return nullptr;
  }
}

void matmul_any(Format format, const uint8_t* groups, int count, int lanes, int cols,
                const Tile& tile, int n, const float* bias, float* out, int64_t out_stride) {
  const auto run = kernel_of(format, n) ? matmul_tile : kMatrixAvx512.matmul;
  run(format, groups, count, lanes, cols, tile, n, bias, out, out_stride);
}

void gate_up_any(Format format, const uint8_t* groups, int count, int cols, const Tile& tile, int n,
                 float* h, int64_t h_stride) {
  const auto run = kernel_of(format, n) ? gate_up_tile : kMatrixAvx512.gate_up;
  run(format, groups, count, cols, tile, n, h, h_stride);
}

uint32_t down_sums_any(Format format, const uint8_t* groups, int count, int lanes, int cols,
                       const Tile& tile, int n, const float* weights, double two_to_grid,
                       int64_t* const* sums) {
  const auto run = kernel_of(format, n) ? down_sums_tile : kMatrixAvx512.down_sums;
  return run(format, groups, count, lanes, cols, tile, n, weights, two_to_grid, sums);
}

}  // namespace

// Largest tiles: AVX-512's of the float formats, ours of the others.
const MatrixKernels kMatrixAmx = {
    {8, 8, 8, kRows, kRows, kRows, kRows, kRows, kRows}, matmul_any, gate_up_any, down_sums_any};

}  // namespace shoal
