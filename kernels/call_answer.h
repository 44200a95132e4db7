// A call in its frame on a table of experts: from the bytes of one to those of its reply.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "expert_table.h"
#include "wire_call.h"
#include "wire_reply.h"

namespace shoal {

// Whether a call's rows are such as a table of that shape takes, and it walks over no more weights.
bool is_for_table(const ExpertShape& shape, const CallFound& call, int64_t max_weight_bytes);

enum class Outcome {
  kReply,    // there is a reply
  kBadRows,  // some rows' results are out of range
  kNotHere,  // an expert that is not in the table: nothing was done
};

// The memory that answering takes, kept from one call to the next.
class CallAnswer {
 public:
  // Between the table's enter and leave, for a call that is for it.  -64 <= grid <= 96.
  Outcome compute(ExpertTable& table, const CallFound& call, int grid, uint32_t queue_us);

  // After kReply, until the next compute.
  const ReplyFrame& reply() const { return *reply_; }

  // bad_rows()[t]: row t is out of range.
  const std::vector<uint8_t>& bad_rows() const { return bad_; }

 private:
  template <class T>
  struct Memory {  // not cleared
    std::unique_ptr<T[]> data;
    size_t room = 0;
    T* of(size_t count) {
      if (room < count) data.reset(new T[room = count]);
      return data.get();
    }
  };

  Memory<int64_t> sums_;
  Memory<uint8_t> numbers_;
  std::vector<uint8_t> bad_;
  std::optional<ReplyFrame> reply_;
};

}  // namespace shoal
