// A call's sums as the bytes of their NodeFrame, and back into somebody's sums.  shoal/wire.py has
// the same with protobuf's own library: what is refused here, it decides and says why.
#pragma once
#include <vector>

#include "wire_fields.h"

namespace shoal {

constexpr uint32_t kReplyExact = 0, kReplyBf16 = 1;  // ReplyFormat of expert.proto

// The fields of a reply that are numbers.
struct ReplyHead {
  uint64_t call_id;
  uint32_t num_rows, dim;
  int32_t grid;
  uint32_t queue_us, compute_us, load_us, format;
};

// The frame of sums [num_rows][dim], each row at the smallest width that holds it, or as bfloat16.
// Made in two steps, so that the caller brings memory of the right size.
class ReplyFrame {
 public:
  ReplyFrame(const ReplyHead& head, const int64_t* sums);
  size_t size() const { return 1 + varint_size(message_size_) + message_size_; }
  void write(uint8_t* out) const;

 private:
  ReplyHead head_;
  const int64_t* sums_;
  std::vector<uint8_t> widths_;
  size_t sums_size_, message_size_;
};

// A reply found in a frame; spans lie in the frame's bytes.  Nothing is checked but its form.
struct ReplyFound {
  ReplyHead head;
  ByteSpan widths, sums;
};

// False: the frame is something else, or a reply in an unusual form.
bool find_reply(ByteSpan frame, ReplyFound& found);

// into[target[t]] += row t.  False: it is not an answer of that grid for these rows, or its sums
// are none; then nothing has changed.  `into` has `rows` rows of `dim` values.
bool add_reply(const ReplyFound& reply, int grid, bool takes_bf16, const int32_t* target,
               int64_t num_targets, int64_t* into, int64_t rows, int64_t dim);

}  // namespace shoal
