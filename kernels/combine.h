// Sums of expert outputs as integers: their way into a message, out of it, and back to float.
#pragma once
#include <cstdint>
#include <string>

namespace shoal {

// out[i] = float(sums[i]) * 2^-grid, one rounding.  -126 <= grid <= 126.
void finish_sums(const int64_t* sums, int grid, float* out, int64_t n);

// widths[t]: the smallest of 2, 3, 4, 8 bytes that holds every value of row t.  Returns the bytes
// of all rows.
int64_t sum_widths(const int64_t* sums, int64_t rows, int64_t dim, uint8_t* widths);

// Row after row, little-endian two's complement, widths[t] bytes a value.
void pack_sums(const int64_t* sums, int64_t rows, int64_t dim, const uint8_t* widths,
               uint8_t* data);

// into[target[t]] += row t of data.  `into` has `rows` rows.  Returns what is wrong with the
// message, and then has changed nothing; empty when all is well.  It may be a stranger's message.
std::string unpack_add_sums(const uint8_t* widths, int64_t packed_rows, const uint8_t* data,
                            int64_t num_bytes, const int32_t* target, int64_t* into, int64_t rows,
                            int64_t dim);

// --wire bf16, which is not exact: data[i] = bfloat16(sums[i] * 2^-grid), to nearest even,
// little-endian.  -64 <= grid <= 96 and |sums| < 2^56, so all of them are normal numbers or 0.
void pack_bf16(const int64_t* sums, int grid, uint8_t* data, int64_t n);

// into[target[t]] += rne(row t of data * 2^grid).  Otherwise as unpack_add_sums.
std::string unpack_add_bf16(const uint8_t* data, int64_t packed_rows, int grid,
                            const int32_t* target, int64_t* into, int64_t rows, int64_t dim);

// A sum of 2^12 experts' |q| < 2^44; a larger value in a message is no honest sum.
constexpr int64_t kMaxSum = int64_t(1) << 56;

}  // namespace shoal
