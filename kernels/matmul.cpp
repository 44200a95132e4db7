// The threaded drivers of matrix products: rows become tiles once, then threads claim row groups.
#include "matmul.h"

#include <algorithm>

#include "quantise.h"
#include "thread_pool.h"
#include "tiles.h"

namespace shoal {

const MatrixKernels& matrix_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return kMatrixAmx;
  if (isa == Isa::avx512) return kMatrixAvx512;
  if (isa == Isa::avxvnni) return kMatrixAvxVnni;
  if (isa == Isa::avx2) return kMatrixAvx2;
#endif
  (void)isa;
  return kMatrixScalar;
}

const QuantiseKernels& quantise_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::scalar) return kQuantiseAvx2;
#endif
  (void)isa;
  return kQuantiseScalar;
}

void quantise_rows(Scheme scheme, const float* x, int num_rows, int dim, int8_t* quants,
                   float* scales, uint8_t* bad) {
  const QuantiseKernels& kernels = quantise_kernels(current_isa());
  const int64_t padded = round_up(dim, span_of(scheme)), spans = padded / span_of(scheme);
  parallel_for(num_rows, std::max(1, 32768 / std::max(dim, 1)), [&](int64_t t, int64_t end, int) {
    for (; t < end; ++t) {
      const float* row = x + t * dim;
      if (scheme == Scheme::f32) {
        bad[t] = !all_finite(row, dim);
      } else {
        const Tile tile{nullptr, quants + t * padded, scales + t * spans, nullptr, nullptr};
        bad[t] = !kernels.quantise(scheme, row, dim, tile, 1, 0, 1);
      }
    }
  });
}

namespace {

// Weight bytes of a chunk: a few microseconds of streaming, far above the cost of claiming one.
constexpr int64_t kChunkBytes = 1 << 16;

}  // namespace

void matmul(const MatrixView& m, const RowsView& rows, const float* bias, float* out) {
  if (rows.num_rows == 0) return;
  const Isa isa = current_isa();
  const MatrixKernels& kernels = matrix_kernels(isa);
  const int max_tile = kernels.max_tile[int(m.format)], num_rows = rows.num_rows;
  const int64_t stride = group_bytes(m.format, m.cols);
  const int groups = num_groups(m.rows);
  const int chunk = int(std::clamp<int64_t>(kChunkBytes / stride, 1, 16));

  void* const memory = thread_scratch(TileBuffer::bytes(m.format, num_rows, m.cols));
  const TileBuffer buffer(static_cast<uint8_t*>(memory), num_rows, m.cols, m.format);
  fill_tiles(isa, rows, nullptr, buffer, max_tile);

  if (num_rows == tile_rows(num_rows, max_tile)) {
    // One tile: nothing but a walk over the weights, as long as it can be.
    const Tile& tile = buffer.tile(0);
    parallel_for_ranges(groups, chunk, [&](int64_t group, int64_t end, int) {
      const int first = int(group) * kLanes, lanes = std::min(int(end) * kLanes, m.rows) - first;
      kernels.matmul(m.format, m.data + group * stride, int(end - group), lanes, m.cols, tile,
                     num_rows, bias == nullptr ? nullptr : bias + first, out + first, m.rows);
    });
    return;
  }
  // Few groups and many rows (a router at prefill): threads share a group's rows too.
  const bool few_groups = groups < 8 * pool_threads();
  const int rows_at_once = few_groups ? 4 * kMaxTile : num_rows;
  const int row_parts = (num_rows + rows_at_once - 1) / rows_at_once;
  const int group_chunk = std::max(kMaxGroups, chunk);
  const int group_parts = (groups + group_chunk - 1) / group_chunk;
  parallel_for(int64_t(group_parts) * row_parts, 1, [&](int64_t item, int64_t, int) {
    const int first_group = int(item / row_parts) * group_chunk;
    const int count = std::min(group_chunk, groups - first_group);
    const int lanes = std::min(count * kLanes, m.rows - first_group * kLanes);
    const int first_row = int(item % row_parts) * rows_at_once;
    const int last_row = std::min(num_rows, first_row + rows_at_once);
    for (int t = first_row, n; t < last_row; t += n) {
      n = tile_rows(last_row - t, max_tile);
      kernels.matmul(m.format, m.data + first_group * stride, count, lanes, m.cols, buffer.tile(t),
                     n, bias == nullptr ? nullptr : bias + first_group * kLanes,
                     out + int64_t(t) * m.rows + first_group * kLanes, m.rows);
    }
  });
}

}  // namespace shoal
