// Laying out activation rows in tiles.
#include "tiles.h"

#include <algorithm>
#include <cstring>

#include "quantise.h"
#include "thread_pool.h"

namespace shoal {

namespace {

struct Offsets {  // of the arrays of a TileBuffer
  int64_t quants, scales, start, sums, tiles, end;
};

// f32: values at 0, no other activations.
Offsets offsets_of(Format format, int64_t rows, int cols) {
  const int64_t tiles = round_up(rows * int64_t(sizeof(Tile)), 64);
  if (scheme_of(format) == Scheme::f32) {
    const int64_t values = round_up(rows * cols * 4, 64);
    return {0, 0, 0, 0, values, values + tiles};
  }
  const int span = span_of(scheme_of(format));
  const int64_t padded = round_up(cols, span), blocks = padded / kBlock;
  Offsets at{};
  at.scales = round_up(rows * padded, 64);
  at.start = at.scales + round_up(rows * (padded / span) * 4, 64);
  at.sums = at.start + (span == kBlock ? round_up(rows * blocks * 4, 64) : 0);
  at.tiles = at.sums + (span == kSuperBlock ? round_up(rows * blocks * 2, 64) : 0);
  at.end = at.tiles + tiles;
  return at;
}

// Calls body(first row, tile rows, tile) for every tile, in parallel when there is work to share.
template <class F>
void for_each_tile(const TileBuffer& buffer, int max_tile, F&& body) {
  const int parts = (buffer.max_rows + max_tile - 1) / max_tile;
  const int64_t work = std::max<int64_t>(1, int64_t(max_tile) * buffer.cols);
  const int64_t chunk = std::max<int64_t>(1, 65536 / work);  // some 10 us
  parallel_for(parts, chunk, [&](int64_t part, int64_t end, int) {
    for (; part < end; ++part) {
      const int last = std::min(buffer.max_rows, int(part + 1) * max_tile);
      for (int first = int(part) * max_tile, n; first < last; first += n) {
        n = tile_rows(last - first, max_tile);
        body(first, n, buffer.tile(first));
      }
    }
  });
}

}  // namespace

bool all_finite(const float* x, int64_t count) {
  uint32_t seen = 0;  // the top bit: an exponent of all ones, to which one was added
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    seen |= (bits & 0x7FFFFFFF) + 0x00800000;
  }
  return seen < 0x80000000;
}

int64_t TileBuffer::bytes(Format format, int max_rows, int cols) {
  return offsets_of(format, max_rows, cols).end;
}

TileBuffer::TileBuffer(uint8_t* memory, int max_rows, int cols, Format format)
    : max_rows(max_rows), cols(cols), format(format) {
  const Offsets at = offsets_of(format, max_rows, cols);
  const int span = span_of(scheme_of(format));
  const int64_t padded = round_up(cols, span), spans = padded / span, blocks = padded / kBlock;
  tiles = reinterpret_cast<Tile*>(memory + at.tiles);
  for (int64_t row = 0; row < max_rows; ++row)
    tiles[row] = {reinterpret_cast<float*>(memory) + row * cols,
                  reinterpret_cast<int8_t*>(memory + at.quants) + row * padded,
                  reinterpret_cast<float*>(memory + at.scales) + row * spans,
                  reinterpret_cast<int32_t*>(memory + at.start) + row * blocks,
                  reinterpret_cast<int16_t*>(memory + at.sums) + row * blocks};
}

void fill_tiles(Isa isa, const RowsView& rows, const int32_t* index, const TileBuffer& buffer,
                int max_tile) {
  const QuantiseKernels& kernels = quantise_kernels(isa);
  const int factor = sum_factor(buffer.format);
  const int64_t padded = round_up(rows.dim, span_of(rows.scheme));
  const int64_t spans = padded / span_of(rows.scheme);
  for_each_tile(buffer, max_tile, [&](int first, int n, const Tile& tile) {
    for (int slot = 0; slot < n; ++slot) {
      const int64_t row = index == nullptr ? first + slot : index[first + slot];
      if (rows.scheme == Scheme::f32) {
        const float* x = rows.floats + row * rows.dim;
        for (int k = 0; k < rows.dim; ++k) tile.values[int64_t(k) * n + slot] = x[k];
      } else {
        kernels.fill(rows.scheme, rows.quants + row * padded, rows.scales + row * spans,
                     int(padded), tile, n, slot, factor);
      }
    }
  });
}

void quantise_tiles(Isa isa, const float* x, int64_t x_stride, const TileBuffer& buffer,
                    int max_tile, uint8_t* finite) {
  const QuantiseKernels& kernels = quantise_kernels(isa);
  const Scheme scheme = scheme_of(buffer.format);
  const int factor = sum_factor(buffer.format);
  for_each_tile(buffer, max_tile, [&](int first, int n, const Tile& tile) {
    for (int slot = 0; slot < n; ++slot) {
      const float* row = x + (first + slot) * x_stride;
      if (scheme == Scheme::f32) {
        for (int k = 0; k < buffer.cols; ++k) tile.values[int64_t(k) * n + slot] = row[k];
        finite[first + slot] = all_finite(row, buffer.cols);
      } else {
        finite[first + slot] = kernels.quantise(scheme, row, buffer.cols, tile, n, slot, factor);
      }
    }
  });
}

}  // namespace shoal
