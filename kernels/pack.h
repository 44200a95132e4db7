// Row-major weights (GGUF blocks, or plain little-endian floats) <-> kernel layout.
#pragma once
#include "matmul.h"

namespace shoal {

// Bytes of one row-major row: cols rounded up to whole blocks.
int64_t row_bytes(Format format, int cols);

// Packs num_rows rows of `cols` columns into whole row groups; consecutive groups land
// group_stride bytes apart.  Lanes beyond num_rows become zero weights.
// What a last, partial block holds beyond cols meets zeros in the activations.
void pack_rows(Format format, const uint8_t* rows, int num_rows, int cols, int64_t group_stride,
               uint8_t* out);

// gate [ffn_dim, dim], up [ffn_dim, dim], down [dim, ffn_dim] row-major -> shape.bytes().
void pack_expert(const ExpertShape& shape, const uint8_t* gate, const uint8_t* up,
                 const uint8_t* down, uint8_t* out);

// Row `row` of a packed matrix as float32: the stored value, rounded at most once.
void unpack_row(const MatrixView& m, int row, float* out);

// Whether every scale (quantised formats) or weight (float formats) of row-major rows is finite.
bool check_finite(Format format, const uint8_t* rows, int64_t num_bytes);

}  // namespace shoal
