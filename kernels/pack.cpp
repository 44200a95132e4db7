// Packing, unpacking and looking up single rows; docs/formats/kernel-layout.md draws the records.
#include "pack.h"

#include <cstring>

#include "lanes_scalar.h"
#include "thread_pool.h"

namespace shoal {

namespace {

// Bytes of one block of one row, row-major.
int block_bytes(Format format) {
  switch (format) {
    case Format::f32:
      return 4;
    case Format::f16:
    case Format::bf16:
      return 2;
    case Format::q8_0:
      return 34;  // f16 d, 32 x int8
    case Format::q4_0:
      return 18;  // f16 d, 16 bytes: byte i = value i (low nibble), value i + 16 (high)
    case Format::q4_1:
      return 20;  // f16 d, f16 m, nibbles as Q4_0
    case Format::q4_t:
      return 18;  // f16 d, codes as Q4_0's nibbles
    case Format::q3_t:
      return 14;  // f16 d, 12 bytes: what a lane of the three cell rows holds
    case Format::q4_k:
      return 144;  // f16 d, f16 dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles
  }
  return 0;
}

// The 8 scales and 8 minimums of a Q4_K super-block are 6 bits each in 12 bytes: bytes 0-3 carry
// scale 0-3, bytes 4-7 min 0-3 (low 6 bits); bytes 8-11 carry the low 4 bits of scale 4-7 (low
// nibble) and min 4-7 (high nibble), whose top 2 bits sit in the top bits of bytes 0-3 and 4-7.
void q4_k_scale_min(const uint8_t* packed, int sub, int* scale, int* min) {
  if (sub < 4) {
    *scale = packed[sub] & 63;
    *min = packed[sub + 4] & 63;
  } else {
    *scale = (packed[sub + 4] & 15) | (packed[sub - 4] >> 6 << 4);
    *min = (packed[sub + 4] >> 4) | (packed[sub] >> 6 << 4);
  }
}

void pack_cells(const uint8_t* from, int cell_rows, uint8_t flip, uint8_t* cells) {
  for (int j = 0; j < cell_rows; ++j)
    for (int i = 0; i < kCell; ++i) cells[j * kCellRow + i] = from[kCell * j + i] ^ flip;
}

void pack_q4_k(const uint8_t* from, int block, int lane, uint8_t* group) {
  uint8_t* record = group + block * Q4_K::record;
  std::memcpy(record + Q4_K::d + lane * 2, from, 2);
  std::memcpy(record + Q4_K::dmin + lane * 2, from + 2, 2);
  for (int sub = 0; sub < 8; ++sub) {
    int scale, min;
    q4_k_scale_min(from + 4, sub, &scale, &min);
    record[Q4_K::scales + sub * kLanes + lane] = uint8_t(scale);
    record[Q4_K::mins + sub / 2 * 32 + lane * 2 + sub % 2] = uint8_t(min);
  }
  for (int c = 0; c < 4; ++c)
    pack_cells(from + 16 + 32 * c, 8, 0, record + Q4_K::quants + c * Q4_K::chunk + lane * kCell);
}

template <class L>
void pack_table(L, const uint8_t* from, int cell_rows, int block, int lane, uint8_t* group) {
  uint8_t* record = group + block / 2 * L::record;
  std::memcpy(record + L::scales + block % 2 * 32 + lane * 2, from, 2);
  pack_cells(from + 2, cell_rows, 0,
             record + L::quants + block % 2 * L::block_quants + lane * kCell);
}

// One block of one row into its lane of a group.
void pack_block(Format format, const uint8_t* from, int block, int lane, uint8_t* group) {
  switch (format) {
    case Format::f32:
      std::memcpy(group + (int64_t(block) * kLanes + lane) * 4, from, 4);
      return;
    case Format::f16:
    case Format::bf16:
      std::memcpy(group + (int64_t(block) * kLanes + lane) * 2, from, 2);
      return;
    case Format::q8_0: {
      uint8_t* record = group + block / 2 * Q8_0::record;
      std::memcpy(record + Q8_0::scales + block % 2 * 32 + lane * 2, from, 2);
      pack_cells(from + 2, 8, 0x80,
                 record + Q8_0::quants + block % 2 * Q8_0::block_quants + lane * kCell);
      return;
    }
    case Format::q4_0: {
      uint8_t* record = group + block / 2 * Q4_0::record;
      std::memcpy(record + Q4_0::scales + block % 2 * 32 + lane * 2, from, 2);
      pack_cells(from + 2, 4, 0,
                 record + Q4_0::quants + block % 2 * Q4_0::block_quants + lane * kCell);
      return;
    }
    case Format::q4_t:
      pack_table(Q4_T{}, from, 4, block, lane, group);
      return;
    case Format::q3_t:
      pack_table(Q3_T{}, from, 3, block, lane, group);
      return;
    case Format::q4_1: {
      uint8_t* record = group + block * Q4_1::record;
      std::memcpy(record + Q4_1::d + lane * 2, from, 2);
      std::memcpy(record + Q4_1::m + lane * 2, from + 2, 2);
      pack_cells(from + 4, 4, 0, record + Q4_1::quants + lane * kCell);
      return;
    }
    case Format::q4_k:
      pack_q4_k(from, block, lane, group);
      return;
  }
}

float half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return widen_half(h);
}

int nibble(const uint8_t* cells, int lane, int i) {  // of the Q4_0 arrangement
  const int byte = cells[i % 16 / kCell * kCellRow + lane * kCell + i % kCell];
  return i < 16 ? byte & 15 : byte >> 4;
}

int three_bits(const uint8_t* cells, int lane, int i) {  // of the Q3_T arrangement
  const uint8_t* at = cells + lane * kCell + i % kCell;
  const int c = i / kCell;
  if (c < 6) return at[c / 2 * kCellRow] >> c % 2 * 3 & 7;
  return at[(c - 6) * 2 * kCellRow] >> 6 | (at[kCellRow] >> c & 1) << 2;
}

// The products below are exact in float32 (11 bits of scale times at most 8 + 6 of integers), so
// each value is rounded at most once, by its last addition.
void unpack_q4_k(const uint8_t* record, int lane, float* out) {
  const float d = half_at(record + Q4_K::d + lane * 2);
  const float dmin = half_at(record + Q4_K::dmin + lane * 2);
  for (int sub = 0; sub < 8; ++sub) {
    const float scale = d * float(record[Q4_K::scales + sub * kLanes + lane]);
    const float min = dmin * float(record[Q4_K::mins + sub / 2 * 32 + lane * 2 + sub % 2]);
    const uint8_t* cells = record + Q4_K::quants + sub / 2 * Q4_K::chunk + lane * kCell;
    for (int i = 0; i < kBlock; ++i) {
      const int byte = cells[i / kCell * kCellRow + i % kCell];
      out[sub * kBlock + i] = scale * float(sub % 2 ? byte >> 4 : byte & 15) - min;
    }
  }
}

void unpack_block(Format format, const uint8_t* group, int block, int lane, float* out) {
  switch (format) {
    case Format::f32:
      std::memcpy(out, group + (int64_t(block) * kLanes + lane) * 4, 4);
      return;
    case Format::f16:
      *out = half_at(group + (int64_t(block) * kLanes + lane) * 2);
      return;
    case Format::bf16: {
      uint16_t half;
      std::memcpy(&half, group + (int64_t(block) * kLanes + lane) * 2, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(out, &bits, 4);
      return;
    }
    case Format::q8_0: {
      const uint8_t* record = group + block / 2 * Q8_0::record;
      const uint8_t* cells = record + Q8_0::quants + block % 2 * Q8_0::block_quants + lane * kCell;
      const float d = half_at(record + Q8_0::scales + block % 2 * 32 + lane * 2);
      for (int i = 0; i < kBlock; ++i)
        out[i] = d * float(cells[i / kCell * kCellRow + i % kCell] - 128);
      return;
    }
    case Format::q4_0: {
      const uint8_t* record = group + block / 2 * Q4_0::record;
      const uint8_t* cells = record + Q4_0::quants + block % 2 * Q4_0::block_quants;
      const float d = half_at(record + Q4_0::scales + block % 2 * 32 + lane * 2);
      for (int i = 0; i < kBlock; ++i) out[i] = d * float(nibble(cells, lane, i) - 8);
      return;
    }
    case Format::q4_t: {
      const uint8_t* record = group + block / 2 * Q4_T::record;
      const uint8_t* cells = record + Q4_T::quants + block % 2 * Q4_T::block_quants;
      const float d = half_at(record + Q4_T::scales + block % 2 * 32 + lane * 2);
      for (int i = 0; i < kBlock; ++i)
        out[i] = d * float(kLevels4[nibble(cells, lane, i)] - kOffset4);
      return;
    }
    case Format::q3_t: {
      const uint8_t* record = group + block / 2 * Q3_T::record;
      const uint8_t* cells = record + Q3_T::quants + block % 2 * Q3_T::block_quants;
      const float d = half_at(record + Q3_T::scales + block % 2 * 32 + lane * 2);
      for (int i = 0; i < kBlock; ++i)
        out[i] = d * float(kLevels3[three_bits(cells, lane, i)] - kOffset3);
      return;
    }
    case Format::q4_1: {
      const uint8_t* record = group + block * Q4_1::record;
      const float d = half_at(record + Q4_1::d + lane * 2);
      const float m = half_at(record + Q4_1::m + lane * 2);
      for (int i = 0; i < kBlock; ++i)
        out[i] = d * float(nibble(record + Q4_1::quants, lane, i)) + m;
      return;
    }
    case Format::q4_k:
      unpack_q4_k(group + block * Q4_K::record, lane, out);
      return;
  }
}

bool finite_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return (h & 0x7C00) != 0x7C00;
}

}  // namespace

int64_t row_bytes(Format format, int cols) {
  return round_up(cols, block_cols(format)) / block_cols(format) * block_bytes(format);
}

void pack_rows(Format format, const uint8_t* rows, int num_rows, int cols, int64_t group_stride,
               uint8_t* out) {
  const int bytes = block_bytes(format), blocks = int(row_bytes(format, cols) / bytes);
  const int64_t stride = row_bytes(format, cols);
  // Lanes beyond the last row: zero scales make them zero, whatever the quants.
  parallel_for(num_groups(num_rows), 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) {
      uint8_t* group = out + g * group_stride;
      std::memset(group, 0, size_t(group_bytes(format, cols)));
      for (int lane = 0; lane < kLanes && g * kLanes + lane < num_rows; ++lane) {
        const uint8_t* from = rows + (g * kLanes + lane) * stride;
        for (int b = 0; b < blocks; ++b)
          pack_block(format, from + int64_t(b) * bytes, b, lane, group);
      }
    }
  });
}

void pack_expert(const ExpertShape& s, const uint8_t* gate, const uint8_t* up, const uint8_t* down,
                 uint8_t* out) {
  pack_rows(s.gate_up, gate, s.ffn_dim, s.dim, 2 * s.gate_bytes(), out);
  pack_rows(s.gate_up, up, s.ffn_dim, s.dim, 2 * s.gate_bytes(), out + s.gate_bytes());
  pack_rows(s.down, down, s.dim, s.ffn_dim, s.down_bytes(), out + s.down_offset());
}

void unpack_row(const MatrixView& m, int row, float* out) {
  const uint8_t* group = m.data + row / kLanes * group_bytes(m.format, m.cols);
  const int size = block_cols(m.format);
  for (int first = 0; first < m.cols; first += size) {
    const int left = m.cols - first;
    if (left >= size) {
      unpack_block(m.format, group, first / size, row % kLanes, out + first);
    } else {
      float block[kSuperBlock];
      unpack_block(m.format, group, first / size, row % kLanes, block);
      std::memcpy(out + first, block, size_t(left) * 4);
    }
  }
}

bool check_finite(Format format, const uint8_t* rows, int64_t num_bytes) {
  const int bytes = block_bytes(format);
  const bool two_scales = format == Format::q4_1 || format == Format::q4_k;
  for (int64_t at = 0; at + bytes <= num_bytes; at += bytes) {
    if (format == Format::f32 || format == Format::bf16) {
      const uint8_t* top = rows + at + bytes - 2;  // the exponent lies in the upper two bytes
      uint16_t h;
      std::memcpy(&h, top, 2);
      if ((h & 0x7F80) == 0x7F80) return false;
    } else if (!finite_half(rows + at) || (two_scales && !finite_half(rows + at + 2))) {
      return false;
    }
  }
  return true;
}

}  // namespace shoal
