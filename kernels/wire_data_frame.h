// An HTTP/2 DATA frame that carries one whole gRPC message, as calls and replies travel.
#pragma once
#include "wire_fields.h"

namespace shoal {

// HTTP/2's header of a frame; gRPC's prefix of a message; both.
constexpr size_t kFrameHeader = 9, kMessagePrefix = 5, kDataHead = kFrameHeader + kMessagePrefix;

inline void put_big_endian(uint8_t* out, uint64_t value, int num_bytes) {
  for (int i = 0; i < num_bytes; ++i) out[i] = uint8_t(value >> (8 * (num_bytes - 1 - i)));
}

inline uint32_t big_endian(const uint8_t* data, int num_bytes) {
  uint32_t value = 0;
  for (int i = 0; i < num_bytes; ++i) value = value << 8 | data[i];
  return value;
}

// Writes what goes before a message of that many bytes: kDataHead bytes.
inline void put_data_head(uint32_t stream_id, size_t length, uint8_t* out) {
  put_big_endian(out, length + kMessagePrefix, 3);
  out[3] = out[4] = 0;  // DATA, no flags
  put_big_endian(out + 5, stream_id, 4);
  out[9] = 0;  // not compressed
  put_big_endian(out + 10, length, 4);
}

enum class Found { kMessage, kPart, kOther };

// What `data` begins with: a DATA frame with one whole message of that stream, what may become one
// within `room` bytes, or anything else.
inline Found find_message(const uint8_t* data, size_t size, uint32_t stream_id, size_t room,
                          ByteSpan& message) {
  if (size < kFrameHeader) return Found::kPart;
  const size_t body = big_endian(data, 3);
  const bool is_plain_data = data[3] == 0 && data[4] == 0;
  if (!is_plain_data || (big_endian(data + 5, 4) & 0x7fffffff) != stream_id) return Found::kOther;
  if (body < kMessagePrefix || kFrameHeader + body > room) return Found::kOther;
  if (size < kFrameHeader + body) return Found::kPart;
  if (data[9] != 0 || big_endian(data + 10, 4) != body - kMessagePrefix) return Found::kOther;
  message = {data + kDataHead, body - kMessagePrefix};
  return Found::kMessage;
}

}  // namespace shoal
