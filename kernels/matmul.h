// Matrix products on weights in kernel layout, and the expert FFN made of them.
//
// docs/formats/kernel-layout.md draws the layout; docs/numerics.md lists the float operations of
// every output element.  Both are the same on every instruction set, for any number of rows and
// threads.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu_features.h"
#include "exact_constants.h"

namespace shoal {

enum class Format : int { f32, f16, bf16, q8_0, q4_0, q4_1, q4_k, q4_t, q3_t };  // shoal.quant
enum class Scheme : int { f32, int8_32, int8_256 };  // shoal.quant.Scheme
constexpr int kNumFormats = 9;

constexpr int kBlock = 32;                // values per quantisation block
constexpr int kSuperBlock = 256;          // values per Q4_K super-block
constexpr int kCell = 4;                  // consecutive k of one row that lie together
constexpr int kCellRow = kLanes * kCell;  // 64 bytes: one cell for each of the 16 lanes

// Records of a row group; byte offsets.
struct Q4_0 {
  static constexpr int blocks = 2, scales = 0, quants = 64, block_quants = 256, record = 576;
};
struct Q8_0 {
  static constexpr int blocks = 2, scales = 0, quants = 64, block_quants = 512, record = 1088;
};
struct Q4_T {
  static constexpr int blocks = 2, scales = 0, quants = 64, block_quants = 256, record = 576;
};
struct Q3_T {
  static constexpr int blocks = 2, scales = 0, quants = 64, block_quants = 192, record = 448;
};
struct Q4_1 {
  static constexpr int blocks = 1, d = 0, m = 32, quants = 64, block_quants = 256, record = 320;
};
struct Q4_K {
  static constexpr int d = 0, dmin = 32, scales = 64, mins = 192, quants = 320, chunk = 512,
                       record = 2368;
};

// In an anonymous namespace, like every helper that a per-ISA file may see: no such file may leave
// a symbol behind that the linker could pick for a CPU that lacks the set.
namespace {

constexpr int block_cols(Format f) {
  return f == Format::q4_k ? kSuperBlock : int(f) <= int(Format::bf16) ? 1 : kBlock;
}
constexpr Scheme scheme_of(Format f) {
  return f == Format::q4_k         ? Scheme::int8_256
         : block_cols(f) == kBlock ? Scheme::int8_32
                                   : Scheme::f32;
}
constexpr int span_of(Scheme s) {
  return s == Scheme::f32 ? 1 : s == Scheme::int8_32 ? kBlock : kSuperBlock;
}
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int num_groups(int rows) { return (rows + kLanes - 1) / kLanes; }

// Bytes of one row group [16, cols].
constexpr int64_t group_bytes(Format f, int cols) {
  const int64_t blocks = round_up(cols, block_cols(f)) / block_cols(f);
  switch (f) {
    case Format::f32:
      return int64_t(cols) * kLanes * 4;
    case Format::f16:
    case Format::bf16:
      return round_up(int64_t(cols) * kLanes * 2, 64);
    case Format::q8_0:
      return blocks / 2 * Q8_0::record + blocks % 2 * (Q8_0::quants + Q8_0::block_quants);
    case Format::q4_0:
      return blocks / 2 * Q4_0::record + blocks % 2 * (Q4_0::quants + Q4_0::block_quants);
    case Format::q4_1:
      return blocks * Q4_1::record;
    case Format::q4_k:
      return blocks * Q4_K::record;
    case Format::q4_t:
      return blocks / 2 * Q4_T::record + blocks % 2 * (Q4_T::quants + Q4_T::block_quants);
    case Format::q3_t:
      return blocks / 2 * Q3_T::record + blocks % 2 * (Q3_T::quants + Q3_T::block_quants);
  }
  return 0;
}

// What a code of a table format stands for: a weight is scale * (level - offset).  Unsigned, for
// vpmaddubsw and vpdpbusd.  At most 64: two products of a pair of weights with activations,
// 2 * 2 * 64 * 127 = 32512, fit in 16 bits.  Those with the least error on Gaussian weights with a
// scale a block of 32, within that bound (docs/shadow.md).
constexpr int kOffset4 = 34, kOffset3 = 35;
alignas(16) constexpr uint8_t kLevels4[16] = {0,  6,  12, 17, 21, 25, 28, 31,
                                              34, 37, 40, 44, 48, 52, 57, 64};
alignas(16) constexpr uint8_t kLevels3[16] = {0, 15, 24, 31, 38, 45, 53, 64};

// Stored Q4_0, Q8_0 and table weights are unsigned; starting the dot at minus their offset times
// the quant sum undoes it.
constexpr int sum_factor(Format f) {
  switch (f) {
    case Format::q4_0:
      return -8;
    case Format::q8_0:
      return -128;
    case Format::q4_t:
      return -kOffset4;
    case Format::q3_t:
      return -kOffset3;
    default:
      return 1;
  }
}

// The records of G row groups at the same columns, `stride` bytes apart.
template <int G>
struct Records {
  const uint8_t* first;
  int64_t stride;

  const uint8_t* operator[](int g) const { return first + g * stride; }
  operator const uint8_t*() const {
    static_assert(G == 1);
    return first;
  }
};

// How many bytes of weights in advance a tile best asks for, on a Zen 5 (README.md).
// One row of bytes is read as fast as it comes; the hardware alone falls behind with weights of
// fewer bits, and the farther the more rows there are.  Floats, four groups at once, are best at
// 4 KiB whatever the rows.
constexpr int zen5_fetched_ahead(int rows, int bits) {
  if (bits > 8) return 4096;
  return rows == 1 && bits == 8 ? 0 : rows < 4 ? 6144 : 8192;
}

// Fetches the weights that lie `ahead` bytes after p[0, bytes).
SHOAL_INLINE void prefetch_weights(const uint8_t* p, int bytes, int ahead) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + ahead + i);
}

}  // namespace

// Activations of a tile of n rows, n a power of two, P = cols padded to the scheme's span:
//   f32       values  float  [cols][n]
//   int8_*    quants  int8   [P/32][n][32]
//   int8_32   scales  float  [P/32][n];   start int32 [P/32][n]: the block's quant sum times
//             sum_factor(format), where the integer dot product starts (or, Q4_1, what m
//             multiplies)
//   int8_256  scales  float  [P/256][n];  sums int16 [P/256][n][8]: quant sum of each 32
struct Tile {
  float* values;
  int8_t* quants;
  float* scales;
  int32_t* start;
  int16_t* sums;
};

constexpr int kMaxTile = 16;   // rows of a tile, at most
constexpr int kMaxGroups = 2;  // row groups that kernels of many rows meet together, at most

// Where the tiles of up to max_rows rows of `cols` columns lie: one after the other, in `memory`
// (64-byte aligned, bytes() long).
struct TileBuffer {
  TileBuffer() = default;
  TileBuffer(uint8_t* memory, int max_rows, int cols, Format format);

  static int64_t bytes(Format f, int max_rows, int cols);

  // Made in advance: a kernel that reads pointers just written, a pair of them by one instruction,
  // waits until all stores before have left, and its results' may take as long as memory does.
  const Tile& tile(int first_row) const { return tiles[first_row]; }

  int max_rows = 0, cols = 0;
  Format format{};  // of the weights that will meet them

 private:
  Tile* tiles = nullptr;  // [max_rows]: one that begins at that row
};

// Row group kernels, one set an instruction set.
struct MatrixKernels {
  // Largest tile of each format: a power of two.
  int max_tile[kNumFormats];

  // out[t * out_stride + i], i < lanes, of one tile: rows [0, lanes) of `count` groups' matrix.
  // bias may be null.
  void (*matmul)(Format, const uint8_t* groups, int count, int lanes, int cols, const Tile&, int n,
                 const float* bias, float* out, int64_t out_stride);

  // h[t * h_stride + i] = silu(gate) * up, i < 16 * count, of `count` pairs of a gate group and an
  // up group.
  void (*gate_up)(Format, const uint8_t* groups, int count, int cols, const Tile&, int n, float* h,
                  int64_t h_stride);

  // sums[t][i] += rne(weights[t] * y * 2^grid), i < lanes, of `count` groups; sums[t] points at the
  // first column of the first group.  Returns a bit for every row with |q| >= 2^44 or a non-finite
  // value; its sums are then undefined.
  uint32_t (*down_sums)(Format, const uint8_t* groups, int count, int lanes, int cols, const Tile&,
                        int n, const float* weights, double two_to_grid, int64_t* const* sums);
};

extern const MatrixKernels kMatrixScalar;
#if defined(__x86_64__)
extern const MatrixKernels kMatrixAvx2;
extern const MatrixKernels kMatrixAvxVnni;
extern const MatrixKernels kMatrixAvx512;
extern const MatrixKernels kMatrixAmx;
#endif
const MatrixKernels& matrix_kernels(Isa isa);

// A weight matrix in kernel layout; data is 64-byte aligned.
struct MatrixView {
  Format format;
  int rows, cols;
  const uint8_t* data;
};

// Activation rows as shoal.rows.Rows carries them.
struct RowsView {
  Scheme scheme;
  int num_rows, dim;
  const float* floats;   // f32: [T, dim]
  const int8_t* quants;  // int8: [T, P]
  const float* scales;   // int8: [T, P / span]
};

// out[T, m.rows] = rows * m^T + bias; bias [m.rows] may be null.  rows.scheme must be
// scheme_of(m.format) and rows.dim == m.cols.
void matmul(const MatrixView& m, const RowsView& rows, const float* bias, float* out);

struct ExpertShape {
  int dim, ffn_dim;
  Format gate_up, down;

  int64_t gate_bytes() const { return group_bytes(gate_up, dim); }
  int64_t down_bytes() const { return group_bytes(down, ffn_dim); }
  int64_t down_offset() const { return num_groups(ffn_dim) * 2 * gate_bytes(); }
  int64_t bytes() const { return down_offset() + num_groups(dim) * down_bytes(); }
};

// One layer's expert call: pair p in [offsets[e], offsets[e + 1]) sends row pair_rows[p] to
// experts[e] with weight pair_weights[p].
struct ExpertCall {
  ExpertShape shape;
  int num_experts;
  const uint8_t* const* experts;  // packed, 64-byte aligned
  const int32_t* offsets;         // [num_experts + 1], ascending from 0
  const int32_t* pair_rows;
  const float* pair_weights;
  int grid;  // in [-100, 100]
};

// sums[T, dim] += every pair's rne(weight * y * 2^grid).  bad[T] (zeroed by the caller) becomes 1
// for rows with a non-finite h or y or with |q| >= 2^44; their sums are then undefined, all other
// rows' are right.
void expert_sums(const ExpertCall& call, const RowsView& rows, int64_t* sums, uint8_t* bad);

// y[T, dim] of one expert for all rows, unweighted.  bad[T] (zeroed by the caller) becomes 1 for
// rows whose h or y is not finite.
void expert_ffn(const ExpertShape& shape, const uint8_t* expert, const RowsView& rows, float* y,
                uint8_t* bad);

}  // namespace shoal
