// A call's pairs are turned around, from the experts of each row to the rows of each expert, by
// counting.  The sums are integers: the order of the pairs does not show.
#include "expert_table.h"

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

namespace shoal {
namespace {

constexpr int64_t kZeroChunk = 1 << 16;  // sums of one claim: 512 KiB

void clear(int64_t* sums, int64_t count) {
  parallel_for(count, kZeroChunk, [&](int64_t begin, int64_t end, int) {
    std::memset(sums + begin, 0, size_t(end - begin) * sizeof *sums);
  });
}

// The experts visited, ascending, and their pairs.
struct Grouped {
  std::vector<const uint8_t*> experts;
  std::vector<int32_t> offsets, rows;
  std::vector<float> weights;
};

Grouped group(const RoutedRows& call, const std::vector<const uint8_t*>& table) {
  const int num_rows = call.rows.num_rows;
  const int32_t num_pairs = call.row_offsets[num_rows];
  std::vector<int32_t> next(table.size(), 0);  // pairs of each expert, then where its next one goes
  for (int32_t p = 0; p < num_pairs; ++p) ++next[size_t(call.experts[p])];
  Grouped grouped;
  grouped.rows.resize(size_t(num_pairs));
  grouped.weights.resize(size_t(num_pairs));
  int32_t position = 0;
  for (size_t e = 0; e < table.size(); ++e) {
    const int32_t count = next[e];
    if (count == 0) continue;
    grouped.experts.push_back(table[e]);
    grouped.offsets.push_back(position);
    next[e] = position;
    position += count;
  }
  grouped.offsets.push_back(position);
  for (int row = 0; row < num_rows; ++row) {
    for (int32_t p = call.row_offsets[row]; p < call.row_offsets[row + 1]; ++p) {
      const size_t at = size_t(next[size_t(call.experts[p])]++);
      grouped.rows[at] = row;
      grouped.weights[at] = call.weights[p];
    }
  }
  return grouped;
}

}  // namespace

bool ExpertTable::sums(const RoutedRows& call, int64_t* sums, uint8_t* bad) {
  const int32_t num_pairs = call.row_offsets[call.rows.num_rows];
  const bool has_all = std::all_of(call.experts, call.experts + num_pairs, [&](int32_t e) {
    return e >= 0 && size_t(e) < experts_.size() && experts_[size_t(e)] != nullptr;
  });
  if (!has_all) return false;
  clear(sums, int64_t(call.rows.num_rows) * shape_.dim);
  const Grouped grouped = group(call, experts_);
  expert_sums({shape_, int(grouped.experts.size()), grouped.experts.data(), grouped.offsets.data(),
               grouped.rows.data(), grouped.weights.data(), call.grid},
              call.rows, sums, bad);
  num_hits_.fetch_add(int64_t(grouped.experts.size()), std::memory_order_relaxed);
  return true;
}

}  // namespace shoal
