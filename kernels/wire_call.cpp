// Calls to frames and back.  Integers and bytes alone: floats are moved, never looked at.
#include "wire_call.h"

#include "floats.h"  // kMaxExpertsPerToken

namespace shoal {
namespace {

constexpr int kCallOfClientFrame = 2;
// Of the widest reply: limits.MAX_MESSAGE_BYTES less wire.ENVELOPE_BYTES.  Where this bounds rows
// to less than kMaxRowsPerCall, a request's row is shorter than a reply's.
constexpr size_t kMaxReplyBytes = (size_t(16) << 20) - 256;

uint32_t span_of_scheme(uint32_t scheme) {
  return scheme == kWireF32 ? 1 : scheme == kWireInt8_32 ? 32 : 256;
}

size_t num_pairs(const CallArrays& call) { return size_t(call.row_offsets[call.head.num_rows]); }

size_t message_size(const CallArrays& call) {
  const CallHead& head = call.head;
  return varint_field_size(head.call_id) + varint_field_size(head.layer) +
         varint_field_size(head.deadline_ms) + varint_field_size(head.scheme) +
         varint_field_size(head.num_rows) + varint_field_size(head.dim) +
         bytes_field_size(call.values.size) + bytes_field_size(call.scales.size) +
         bytes_field_size(2 * size_t(head.num_rows)) + bytes_field_size(2 * num_pairs(call)) +
         bytes_field_size(4 * num_pairs(call)) + varint_field_size(head.reply_format);
}

void put_u16(uint8_t* out, int32_t value) {
  out[0] = uint8_t(value);
  out[1] = uint8_t(uint32_t(value) >> 8);
}

uint32_t u16_at(const uint8_t* p) { return p[0] | uint32_t(p[1]) << 8; }

bool are_rows_legal(const CallFound& call) {
  const CallHead& head = call.head;
  const size_t rows = head.num_rows, dim = head.dim;
  if (rows > 1 && rows * (8 * dim + 1) > kMaxReplyBytes) return false;
  if (head.scheme == kWireF32) return call.values.size == 4 * rows * dim && call.scales.size == 0;
  const size_t padded = padded_dim(head.scheme, head.dim);
  if (call.values.size != rows * padded) return false;
  if (call.scales.size != 4 * rows * (padded / span_of_scheme(head.scheme))) return false;
  if (std::memchr(call.values.data, 0x80, call.values.size) != nullptr) return false;
  if (padded == dim) return true;
  for (size_t row = 0; row < rows; ++row)
    for (size_t i = dim; i < padded; ++i)
      if (call.values.data[row * padded + i] != 0) return false;
  return true;
}

// A row's experts, each in its place of a table that is all false before and after.
class ExpertsSeen {
 public:
  bool are_legal(const uint8_t* experts, uint32_t n) {
    bool is_legal = true;
    uint32_t seen = 0;
    for (; is_legal && seen < n; ++seen) {
      const uint32_t expert = u16_at(experts + 2 * seen);
      is_legal = expert < kMaxExperts && !(words_[expert / 64] >> expert % 64 & 1);
      if (is_legal) words_[expert / 64] |= uint64_t(1) << expert % 64;
    }
    for (uint32_t i = 0; i < seen; ++i) {
      const uint32_t expert = u16_at(experts + 2 * i);
      if (expert < kMaxExperts) words_[expert / 64] = 0;
    }
    return is_legal;
  }

 private:
  uint64_t words_[kMaxExperts / 64] = {};
};

bool are_pairs_legal(CallFound& call) {
  const uint32_t rows = call.head.num_rows;
  if (call.pairs_per_row.size != 2 * size_t(rows)) return false;
  call.num_pairs = 0;
  for (uint32_t row = 0; row < rows; ++row) {
    const uint32_t count = u16_at(call.pairs_per_row.data + 2 * row);
    if (count < 1 || count > uint32_t(kMaxExpertsPerToken)) return false;
    call.num_pairs += count;
  }
  if (call.experts.size != 2 * size_t(call.num_pairs)) return false;
  if (call.weights.size != 4 * size_t(call.num_pairs)) return false;
  ExpertsSeen seen;
  const uint8_t* experts = call.experts.data;
  for (uint32_t row = 0; row < rows; ++row) {
    const uint32_t count = u16_at(call.pairs_per_row.data + 2 * row);
    if (!seen.are_legal(experts, count)) return false;
    experts += 2 * count;
  }
  return true;
}

bool are_values_aligned(const CallFound& call) {
  return reinterpret_cast<uintptr_t>(call.values.data) % 4 == 0;
}

}  // namespace

uint32_t padded_dim(uint32_t scheme, uint32_t dim) {
  const uint32_t span = span_of_scheme(scheme);
  return (dim + span - 1) / span * span;
}

size_t call_frame_size(const CallArrays& call) {
  const size_t size = message_size(call);
  return 1 + varint_size(size) + size;
}

void write_call_frame(const CallArrays& call, uint8_t* out) {
  const CallHead& head = call.head;
  const size_t rows = head.num_rows, pairs = num_pairs(call);
  FieldWriter write(out);
  write.begin_message(kCallOfClientFrame, message_size(call));
  write.varint(1, head.call_id);
  write.varint(2, head.layer);
  write.varint(3, head.deadline_ms);
  write.varint(4, head.scheme);
  write.varint(5, head.num_rows);
  write.varint(6, head.dim);
  write.bytes(7, call.values.data, call.values.size);
  write.bytes(8, call.scales.data, call.scales.size);
  uint8_t* counts = write.begin_bytes(9, 2 * rows);
  for (size_t row = 0; row < rows; ++row)
    put_u16(counts + 2 * row, call.row_offsets[row + 1] - call.row_offsets[row]);
  uint8_t* experts = write.begin_bytes(10, 2 * pairs);
  for (size_t i = 0; i < pairs; ++i) put_u16(experts + 2 * i, call.experts[i]);
  write.bytes(11, call.weights, 4 * pairs);
  write.varint(12, head.reply_format);
}

size_t numbers_size(const CallFound& call) {
  const size_t fixed = 4 * (size_t(call.head.num_rows) + 1 + 2 * size_t(call.num_pairs));
  return fixed + call.scales.size + (are_values_aligned(call) ? 0 : call.values.size);
}

const uint8_t* put_numbers(const CallFound& call, uint8_t* out) {
  auto* offsets = reinterpret_cast<int32_t*>(out);
  offsets[0] = 0;
  for (uint32_t row = 0; row < call.head.num_rows; ++row)
    offsets[row + 1] = offsets[row] + int32_t(u16_at(call.pairs_per_row.data + 2 * row));
  int32_t* experts = offsets + call.head.num_rows + 1;
  for (uint32_t i = 0; i < call.num_pairs; ++i)
    experts[i] = int32_t(u16_at(call.experts.data + 2 * i));
  auto* rest = reinterpret_cast<uint8_t*>(experts + call.num_pairs);
  std::memcpy(rest, call.weights.data, call.weights.size);
  rest += call.weights.size;
  if (call.scales.size) std::memcpy(rest, call.scales.data, call.scales.size);
  if (are_values_aligned(call)) return call.values.data;
  rest += call.scales.size;
  std::memcpy(rest, call.values.data, call.values.size);
  return rest;
}

bool find_call(ByteSpan frame, CallFound& found) {
  FieldReader outer(frame.data, frame.size);
  const ByteSpan message = outer.bytes(kCallOfClientFrame);
  if (!outer.is_whole() || message.size == 0) return false;
  FieldReader read(message.data, message.size);
  CallHead& head = found.head;
  head.call_id = read.varint(1, UINT64_MAX);
  head.layer = uint32_t(read.varint(2, kMaxLayers - 1));
  head.deadline_ms = uint32_t(read.varint(3, kMaxDeadlineMs));
  head.scheme = uint32_t(read.varint(4, kWireInt8_256));
  head.num_rows = uint32_t(read.varint(5, kMaxRowsPerCall));
  head.dim = uint32_t(read.varint(6, kMaxModelDim));
  found.values = read.bytes(7);
  found.scales = read.bytes(8);
  found.pairs_per_row = read.bytes(9);
  found.experts = read.bytes(10);
  found.weights = read.bytes(11);
  head.reply_format = uint32_t(read.varint(12, 1));
  if (!read.is_whole()) return false;
  if (!head.deadline_ms || !head.scheme || !head.num_rows || !head.dim) return false;
  return are_rows_legal(found) && are_pairs_legal(found);
}

}  // namespace shoal
