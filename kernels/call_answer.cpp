// See the header.  Times are told to the coordinator: its predictions are fitted to them.
#include "call_answer.h"

#include <algorithm>
#include <chrono>

namespace shoal {

bool is_for_table(const ExpertShape& shape, const CallFound& call, int64_t max_weight_bytes) {
  return int64_t(call.head.dim) == shape.dim &&
         int(call.head.scheme) - 1 == int(scheme_of(shape.gate_up)) &&
         int64_t(call.num_pairs) * shape.bytes() <= max_weight_bytes;
}

Outcome CallAnswer::compute(ExpertTable& table, const CallFound& call, int grid,
                            uint32_t queue_us) {
  using Clock = std::chrono::steady_clock;
  const auto began = Clock::now();
  const CallHead& head = call.head;
  const size_t rows = head.num_rows, pairs = call.num_pairs;
  uint8_t* numbers = numbers_.of(numbers_size(call));
  const uint8_t* values = put_numbers(call, numbers);
  const auto* offsets = reinterpret_cast<const int32_t*>(numbers);
  const int32_t* experts = offsets + rows + 1;
  const auto* weights = reinterpret_cast<const float*>(experts + pairs);
  const RowsView view{Scheme(int(head.scheme) - 1),
                      int(rows),
                      int(head.dim),
                      reinterpret_cast<const float*>(values),
                      reinterpret_cast<const int8_t*>(values),
                      weights + pairs};
  int64_t* sums = sums_.of(rows * head.dim);
  bad_.assign(rows, 0);
  if (!table.sums({view, offsets, experts, weights, grid}, sums, bad_.data()))
    return Outcome::kNotHere;
  if (std::find(bad_.begin(), bad_.end(), 1) != bad_.end()) return Outcome::kBadRows;
  const auto spent = Clock::now() - began;
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(spent).count();
  const uint32_t compute_us = uint32_t(std::min<int64_t>(us, UINT32_MAX));
  reply_.emplace(ReplyHead{head.call_id, head.num_rows, head.dim, grid, queue_us, compute_us, 0,
                           head.reply_format},
                 sums);
  return Outcome::kReply;
}

}  // namespace shoal
