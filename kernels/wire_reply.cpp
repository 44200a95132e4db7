// Replies to frames and back.  How sums are packed is combine.h's business.
#include "wire_reply.h"

#include "combine.h"

namespace shoal {
namespace {

constexpr int kReplyOfNodeFrame = 2;

uint32_t zigzag(int32_t value) { return uint32_t(value) << 1 ^ uint32_t(value >> 31); }
int32_t from_zigzag(uint32_t value) { return int32_t(value >> 1 ^ (0 - (value & 1))); }

}  // namespace

ReplyFrame::ReplyFrame(const ReplyHead& head, const int64_t* sums) : head_(head), sums_(sums) {
  if (head.format == kReplyExact) {
    widths_.resize(head.num_rows);
    sums_size_ = size_t(sum_widths(sums, head.num_rows, head.dim, widths_.data()));
  } else {
    sums_size_ = 2 * size_t(head.num_rows) * head.dim;
  }
  message_size_ = varint_field_size(head.call_id) + varint_field_size(head.num_rows) +
                  varint_field_size(head.dim) + varint_field_size(zigzag(head.grid)) +
                  bytes_field_size(widths_.size()) + bytes_field_size(sums_size_) +
                  varint_field_size(head.queue_us) + varint_field_size(head.compute_us) +
                  varint_field_size(head.load_us) + varint_field_size(head.format);
}

void ReplyFrame::write(uint8_t* out) const {
  const int64_t rows = head_.num_rows, dim = head_.dim;
  FieldWriter write(out);
  write.begin_message(kReplyOfNodeFrame, message_size_);
  write.varint(1, head_.call_id);
  write.varint(2, head_.num_rows);
  write.varint(3, head_.dim);
  write.varint(4, zigzag(head_.grid));
  write.bytes(5, widths_.data(), widths_.size());
  uint8_t* packed = write.begin_bytes(6, sums_size_);
  if (head_.format == kReplyExact) {
    pack_sums(sums_, rows, dim, widths_.data(), packed);
  } else {
    pack_bf16(sums_, head_.grid, packed, rows * dim);
  }
  write.varint(7, head_.queue_us);
  write.varint(8, head_.compute_us);
  write.varint(9, head_.load_us);
  write.varint(10, head_.format);
}

bool find_reply(ByteSpan frame, ReplyFound& found) {
  FieldReader outer(frame.data, frame.size);
  const ByteSpan message = outer.bytes(kReplyOfNodeFrame);
  if (!outer.is_whole() || message.size == 0) return false;
  FieldReader read(message.data, message.size);
  ReplyHead& head = found.head;
  head.call_id = read.varint(1, UINT64_MAX);
  head.num_rows = uint32_t(read.varint(2, UINT32_MAX));
  head.dim = uint32_t(read.varint(3, UINT32_MAX));
  head.grid = from_zigzag(uint32_t(read.varint(4, UINT32_MAX)));
  found.widths = read.bytes(5);
  found.sums = read.bytes(6);
  head.queue_us = uint32_t(read.varint(7, UINT32_MAX));
  head.compute_us = uint32_t(read.varint(8, UINT32_MAX));
  head.load_us = uint32_t(read.varint(9, UINT32_MAX));
  head.format = uint32_t(read.varint(10, kReplyBf16));
  return read.is_whole();
}

bool add_reply(const ReplyFound& reply, int grid, bool takes_bf16, const int32_t* target,
               int64_t num_targets, int64_t* into, int64_t rows, int64_t dim) {
  const ReplyHead& head = reply.head;
  if (int64_t(head.num_rows) != num_targets || int64_t(head.dim) != dim || head.grid != grid)
    return false;
  if (head.format == kReplyExact) {
    if (int64_t(reply.widths.size) != num_targets) return false;
    return unpack_add_sums(reply.widths.data, num_targets, reply.sums.data,
                           int64_t(reply.sums.size), target, into, rows, dim)
        .empty();
  }
  if (!takes_bf16 || reply.widths.size != 0) return false;
  if (reply.sums.size != 2 * size_t(num_targets) * size_t(dim)) return false;
  return unpack_add_bf16(reply.sums.data, num_targets, grid, target, into, rows, dim).empty();
}

}  // namespace shoal
