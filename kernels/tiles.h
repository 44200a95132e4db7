// Laying out activation rows in tiles, for the drivers of matmul.cpp and expert_sums.cpp.
#pragma once
#include "matmul.h"

namespace shoal {

// Largest tile (a power of two up to max_tile) that fits in the remaining rows.
inline int tile_rows(int remaining, int max_tile) {
  int n = 1;
  while (n * 2 <= remaining && n * 2 <= max_tile) n *= 2;
  return n;
}

// Whether none of x[count] is NaN or infinite.
bool all_finite(const float* x, int64_t count);

// Lays out rows[0, buffer.max_rows), or rows index[0, buffer.max_rows), as tiles of at most
// max_tile rows.
void fill_tiles(Isa isa, const RowsView& rows, const int32_t* index, const TileBuffer& buffer,
                int max_tile);

// Quantises (int8 schemes) or copies (f32) x[buffer.max_rows] rows of buffer.cols columns, which
// lie x_stride apart, into tiles.  finite[i] becomes whether row i is.
void quantise_tiles(Isa isa, const float* x, int64_t x_stride, const TileBuffer& buffer,
                    int max_tile, uint8_t* finite);

}  // namespace shoal
