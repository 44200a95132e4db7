// Integer sums, packed and unpacked.  Integers and one conversion: no float order to keep.
#include "combine.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "thread_pool.h"

namespace shoal {
namespace {

constexpr int64_t kValuesPerChunk = 16384;

int64_t rows_per_chunk(int64_t dim) { return std::max<int64_t>(1, kValuesPerChunk / dim); }

std::vector<int64_t> offsets_of(const uint8_t* widths, int64_t rows, int64_t dim) {
  std::vector<int64_t> offsets(size_t(rows) + 1, 0);
  for (int64_t t = 0; t < rows; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + widths[t] * dim;
  return offsets;
}

uint8_t width_of(const int64_t* row, int64_t dim) {
  uint64_t magnitudes = 0;  // v >= 0: v; v < 0: -v - 1: both need the same bits
  for (int64_t i = 0; i < dim; ++i) magnitudes |= uint64_t(row[i] ^ (row[i] >> 63));
  return magnitudes < 1ull << 15   ? 2
         : magnitudes < 1ull << 23 ? 3
         : magnitudes < 1ull << 31 ? 4
                                   : 8;
}

inline __attribute__((always_inline)) void pack_row(const int64_t* row, int64_t dim, int width,
                                                    uint8_t* out) {
  for (int64_t i = 0; i < dim; ++i)
    for (int b = 0; b < width; ++b) out[i * width + b] = uint8_t(uint64_t(row[i]) >> (8 * b));
}

template <int Width>
int64_t value_at(const uint8_t* p) {
  uint64_t bits = 0;
  for (int b = 0; b < Width; ++b) bits |= uint64_t(p[b]) << (8 * b);
  return int64_t(bits << (64 - 8 * Width)) >> (64 - 8 * Width);
}

template <int Width>
void add_row(const uint8_t* data, int64_t dim, int64_t* into) {
  for (int64_t i = 0; i < dim; ++i)
    into[i] = int64_t(uint64_t(into[i]) + uint64_t(value_at<Width>(data + i * Width)));
}

bool is_honest(const uint8_t* data, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t value = value_at<8>(data + 8 * i);
    if (value >= kMaxSum || value <= -kMaxSum) return false;
  }
  return true;
}

// Integers all the way: the bits are the same everywhere, though they are not the sum's.
uint16_t bf16_of(int64_t sum, int grid) {
  if (sum == 0) return 0;
  const uint64_t magnitude = sum < 0 ? uint64_t(-sum) : uint64_t(sum);
  int exponent = 63 - __builtin_clzll(magnitude);
  uint64_t digits = magnitude << (63 - exponent) >> 56;  // eight of them, the first one 1
  if (exponent > 7) {
    const uint64_t rest = magnitude << (64 - (exponent - 7));
    const uint64_t half = uint64_t(1) << 63;
    digits += rest > half || (rest == half && (digits & 1));
    if (digits == 256) {
      digits = 128;
      ++exponent;
    }
  }
  return uint16_t((sum < 0) << 15 | (127 + exponent - grid) << 7 | int(digits & 127));
}

// kMaxSum: no honest value.
int64_t sum_of(uint16_t bits, int grid) {
  const int biased = bits >> 7 & 255;
  if (biased == 0) return bits & 127 ? kMaxSum : 0;
  const uint64_t digits = 128 | (bits & 127);
  const int shift = biased - 127 - 7 + grid;
  if (biased == 255 || shift > 48) return kMaxSum;
  uint64_t magnitude = 0;
  if (shift >= 0) {
    magnitude = digits << shift;
  } else if (shift >= -8) {
    const uint64_t half = uint64_t(1) << (-shift - 1);
    magnitude = (digits + half - 1 + (digits >> -shift & 1)) >> -shift;
  }
  return bits >> 15 ? -int64_t(magnitude) : int64_t(magnitude);
}

uint16_t bits_at(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

}  // namespace

void finish_sums(const int64_t* sums, int grid, float* out, int64_t n) {
  const uint32_t bits = uint32_t(127 - grid) << 23;
  float quantum;
  std::memcpy(&quantum, &bits, 4);
  parallel_for(n, kValuesPerChunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) out[i] = float(sums[i]) * quantum;
  });
}

int64_t sum_widths(const int64_t* sums, int64_t rows, int64_t dim, uint8_t* widths) {
  parallel_for(rows, rows_per_chunk(dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) widths[t] = width_of(sums + t * dim, dim);
  });
  return offsets_of(widths, rows, dim).back();
}

void pack_sums(const int64_t* sums, int64_t rows, int64_t dim, const uint8_t* widths,
               uint8_t* data) {
  const std::vector<int64_t> offsets = offsets_of(widths, rows, dim);
  parallel_for(rows, rows_per_chunk(dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      uint8_t* out = data + offsets[size_t(t)];
      const int64_t* row = sums + t * dim;
      switch (widths[t]) {  // a constant width lets the compiler see plain stores
        case 2:
          pack_row(row, dim, 2, out);
          break;
        case 3:
          pack_row(row, dim, 3, out);
          break;
        case 4:
          pack_row(row, dim, 4, out);
          break;
        default:
          pack_row(row, dim, 8, out);
      }
    }
  });
}

void pack_bf16(const int64_t* sums, int grid, uint8_t* data, int64_t n) {
  parallel_for(n, kValuesPerChunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t bits = bf16_of(sums[i], grid);
      data[2 * i] = uint8_t(bits);
      data[2 * i + 1] = uint8_t(bits >> 8);
    }
  });
}

std::string unpack_add_bf16(const uint8_t* data, int64_t packed_rows, int grid,
                            const int32_t* target, int64_t* into, int64_t rows, int64_t dim) {
  for (int64_t t = 0; t < packed_rows; ++t) {
    if (target[t] < 0 || target[t] >= rows)
      return "row " + std::to_string(t) + " belongs to row " + std::to_string(target[t]) + " of " +
             std::to_string(rows);
    for (int64_t i = t * dim; i < (t + 1) * dim; ++i)
      if (sum_of(bits_at(data + 2 * i), grid) == kMaxSum)
        return "row " + std::to_string(t) + ": a value that is not finite, or of 2^56 quanta";
  }
  for (int64_t t = 0; t < packed_rows; ++t)
    for (int64_t i = 0; i < dim; ++i)
      into[target[t] * dim + i] += sum_of(bits_at(data + 2 * (t * dim + i)), grid);
  return "";
}

std::string unpack_add_sums(const uint8_t* widths, int64_t packed_rows, const uint8_t* data,
                            int64_t num_bytes, const int32_t* target, int64_t* into, int64_t rows,
                            int64_t dim) {
  for (int64_t t = 0; t < packed_rows; ++t) {
    const int width = widths[t];
    if (width != 2 && width != 3 && width != 4 && width != 8)
      return "row " + std::to_string(t) + ": " + std::to_string(width) +
             " bytes a value: must be 2, 3, 4 or 8";
    if (target[t] < 0 || target[t] >= rows)
      return "row " + std::to_string(t) + " belongs to row " + std::to_string(target[t]) + " of " +
             std::to_string(rows);
  }
  const std::vector<int64_t> offsets = offsets_of(widths, packed_rows, dim);
  if (offsets.back() != num_bytes)
    return std::to_string(num_bytes) + " bytes of sums where the widths ask for " +
           std::to_string(offsets.back());
  for (int64_t t = 0; t < packed_rows; ++t)
    if (widths[t] == 8 && !is_honest(data + offsets[size_t(t)], dim))
      return "row " + std::to_string(t) + ": a sum of 2^56 or more";
  for (int64_t t = 0; t < packed_rows; ++t) {
    const uint8_t* row = data + offsets[size_t(t)];
    int64_t* out = into + target[t] * dim;
    switch (widths[t]) {
      case 2:
        add_row<2>(row, dim, out);
        break;
      case 3:
        add_row<3>(row, dim, out);
        break;
      case 4:
        add_row<4>(row, dim, out);
        break;
      default:
        add_row<8>(row, dim, out);
    }
  }
  return "";
}

}  // namespace shoal
