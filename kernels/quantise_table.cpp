// Q4_0, Q4_T, Q3_T: value = scale * level[code], an f16 scale a block of 32.
//
// Minimises the squared error of the weights, each column weighed by its importance:
//   1. seven scales of either sign, which spread around the one that maps the largest value on the
//      largest level; each gives codes, those a least-squares scale, and that an error;
//   2. twice, from the best: codes for the scale, the best scale for those codes;
//   3. the codes for the scale as rounded to f16.
// The sign matters, as no table is symmetric.  More candidates: 0.1 % less error (Gaussian
// weights).
#include "quantise_table.h"

#include <cstring>

#include "isa_table.h"
#include "pack.h"
#include "thread_pool.h"

namespace shoal {

LevelTable level_table(Format format) {
  LevelTable table{format == Format::q3_t ? 8 : 16, {}};
  for (int i = 0; i < table.count; ++i)
    table.level[i] = format == Format::q4_0   ? float(i - 8)
                     : format == Format::q4_t ? float(kLevels4[i] - kOffset4)
                                              : float(kLevels3[i] - kOffset3);
  return table;
}

namespace {

// Codes k and k + 16 share a byte.
void put_nibbles(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < kBlock / 2; ++i) out[i] = uint8_t(codes[i] | codes[i + kBlock / 2] << 4);
}

// Twelve bytes of eight codes each way: see docs/formats/kernel-layout.md, Q3_T.
void put_three_bits(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < kCell; ++i) {
    const auto code = [&](int c) { return codes[c * kCell + i]; };
    for (int r = 0; r < 3; ++r) out[r * kCell + i] = uint8_t(code(2 * r) | code(2 * r + 1) << 3);
    out[i] = uint8_t(out[i] | code(6) << 6);
    out[2 * kCell + i] = uint8_t(out[2 * kCell + i] | code(7) << 6);
    out[kCell + i] = uint8_t(out[kCell + i] | (code(6) & 4) << 4 | (code(7) & 4) << 5);
  }
}

}  // namespace

void quantise_table(Format format, const float* values, const float* importance, int64_t num_rows,
                    int cols, uint8_t* out) {
  const QuantiseTable& kernels = SHOAL_ISA_TABLE(kQuantiseTable);
  const LevelTable table = level_table(format);
  const int blocks_of_row = cols / kBlock;
  const int64_t bytes = row_bytes(format, kBlock);
  parallel_for(num_rows * blocks_of_row, 64, [&](int64_t b, int64_t end, int) {
    for (; b < end; b += kLanes) {
      const int count = end - b < kLanes ? int(end - b) : kLanes;
      uint16_t scales[kLanes];
      uint8_t codes[kLanes * kBlock];
      kernels.blocks(table, values + b * kBlock, importance, int(b % blocks_of_row), blocks_of_row,
                     count, scales, codes);
      for (int i = 0; i < count; ++i) {
        uint8_t* to = out + (b + i) * bytes;
        std::memcpy(to, &scales[i], 2);
        if (format == Format::q3_t)
          put_three_bits(codes + i * kBlock, to + 2);
        else
          put_nibbles(codes + i * kBlock, to + 2);
      }
    }
  });
}

}  // namespace shoal
