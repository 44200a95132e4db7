// Protobuf's wire format, as far as the frames of calls and replies need it: fields of one byte's
// tag, varints and byte strings, in the order of their numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace shoal {

// Whether memory holds integers and floats as the wire does; elsewhere the caller takes them apart.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr bool kIsWireOrder = true;
#else
constexpr bool kIsWireOrder = false;
#endif

struct ByteSpan {
  const uint8_t* data = nullptr;
  size_t size = 0;
};

constexpr uint8_t varint_tag(int field) { return uint8_t(field << 3); }
constexpr uint8_t bytes_tag(int field) { return uint8_t(field << 3 | 2); }

inline size_t varint_size(uint64_t value) {
  size_t size = 1;
  for (; value >= 128; value >>= 7) ++size;
  return size;
}

// Of a whole field; proto3 leaves out what is zero or empty.
inline size_t varint_field_size(uint64_t value) { return value ? 1 + varint_size(value) : 0; }
inline size_t bytes_field_size(size_t size) { return size ? 1 + varint_size(size) + size : 0; }

// Writes fields to memory that the sizes above were added up for.
class FieldWriter {
 public:
  explicit FieldWriter(uint8_t* out) : out_(out) {}
  uint8_t* end() const { return out_; }

  void varint(int field, uint64_t value) {
    if (value == 0) return;
    *out_++ = varint_tag(field);
    put_varint(value);
  }

  // Begins a field of that many bytes and returns where they go; of none: nothing is written.
  uint8_t* begin_bytes(int field, size_t size) {
    if (size == 0) return out_;
    *out_++ = bytes_tag(field);
    put_varint(size);
    uint8_t* bytes = out_;
    out_ += size;
    return bytes;
  }

  void bytes(int field, const void* data, size_t size) {
    uint8_t* out = begin_bytes(field, size);
    if (size) std::memcpy(out, data, size);
  }

  // Begins a message of that many bytes: its fields follow.
  void begin_message(int field, size_t size) {
    *out_++ = bytes_tag(field);
    put_varint(size);
  }

 private:
  void put_varint(uint64_t value) {
    for (; value >= 128; value >>= 7) *out_++ = uint8_t(value | 128);
    *out_++ = uint8_t(value);
  }

  uint8_t* out_;
};

// Reads fields in the order in which they are asked for, each at most once.  What is in another
// order, unknown, repeated, longer than it need be or cut off is left unread: then `is_whole` is
// false at the end.  A stranger's bytes: nothing beyond them is read.
class FieldReader {
 public:
  FieldReader(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  // 0 where the field is absent.  A value above `highest` spoils the message.
  uint64_t varint(int field, uint64_t highest) {
    if (!next_is(varint_tag(field))) return 0;
    ++at_;
    const uint64_t value = take_varint();
    if (value > highest) is_bad_ = true;
    return value;
  }

  // Empty where the field is absent.
  ByteSpan bytes(int field) {
    if (!next_is(bytes_tag(field))) return {};
    ++at_;
    const uint64_t size = take_varint();
    if (is_bad_ || size > uint64_t(end_ - at_)) {
      is_bad_ = true;
      return {};
    }
    const ByteSpan taken{at_, size_t(size)};
    at_ += size;
    return taken;
  }

  // Every byte was part of a field that was asked for.
  bool is_whole() const { return !is_bad_ && at_ == end_; }

 private:
  bool next_is(uint8_t tag) const { return !is_bad_ && at_ != end_ && *at_ == tag; }

  uint64_t take_varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && at_ != end_; shift += 7) {
      const uint8_t byte = *at_++;
      if (shift == 63 && byte > 1) break;
      value |= uint64_t(byte & 127) << shift;
      if (byte < 128) {
        if (byte == 0 && shift != 0) break;  // a shorter form says the same
        return value;
      }
    }
    is_bad_ = true;
    return 0;
  }

  const uint8_t* at_;
  const uint8_t* end_;
  bool is_bad_ = false;
};

}  // namespace shoal
