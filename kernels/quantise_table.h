// Our own quantisation of float weights to the formats whose quants stand for levels of a table.
#pragma once
#include "matmul.h"

namespace shoal {

// values[num_rows, cols] -> out, num_rows rows of cols / 32 blocks: Q4_0, Q4_T or Q3_T, row-major.
// cols is a multiple of 32; values are finite.  importance[cols], >= 0, weighs the squared error of
// a column; null: all alike.  The bytes are part of an artifact's identity: the same on every CPU,
// compiler and number of threads.
void quantise_table(Format format, const float* values, const float* importance, int64_t num_rows,
                    int cols, uint8_t* out);

// Where the levels of a block format lie.
struct LevelTable {
  int count;        // 8 or 16, ascending
  float level[16];  // as signed numbers
};
LevelTable level_table(Format format);

// Up to 16 blocks: values[count * 32] -> scales[count] (halves) and codes[count * 32].  Block i has
// the weights importance[(first + i) % blocks_of_row * 32 ...]; null: all 1.
struct QuantiseTable {
  void (*blocks)(const LevelTable& table, const float* values, const float* importance, int first,
                 int blocks_of_row, int count, uint16_t* scales, uint8_t* codes);
};
extern const QuantiseTable kQuantiseTableScalar;
#if defined(__x86_64__)
extern const QuantiseTable kQuantiseTableAvx2;
extern const QuantiseTable kQuantiseTableAvx512;
#endif

}  // namespace shoal
