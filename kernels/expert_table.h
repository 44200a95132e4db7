// The experts of one layer that this process owns, all of them in memory: called by number.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "matmul.h"

namespace shoal {

// Row t of a call visits experts[p] with weights[p] for p in [row_offsets[t], row_offsets[t + 1]).
struct RoutedRows {
  RowsView rows;
  const int32_t* row_offsets;  // [rows.num_rows + 1], ascending from 0
  const int32_t* experts;
  const float* weights;
  int grid;  // in [-100, 100]
};

// Thread-safe.  The owner of the memory publishes a table, and withdraws it before it gives any of
// that memory away; a call holds the memory from an `enter` that succeeded to its `leave`.
class ExpertTable {
 public:
  // experts[i]: packed, 64-byte aligned; null: not owned.
  ExpertTable(const ExpertShape& shape, std::vector<const uint8_t*> experts)
      : shape_(shape), experts_(std::move(experts)) {}

  // False: it was withdrawn.
  bool enter() {
    uint64_t state = state_.load(std::memory_order_relaxed);
    while (!(state & kWithdrawn))
      if (state_.compare_exchange_weak(state, state + kCaller)) return true;
    return false;
  }

  // True: this was the last call of a withdrawn table.
  bool leave() { return state_.fetch_sub(kCaller) == kCaller + kWithdrawn; }

  // Nobody enters any more.  True: nobody is inside; else some `leave` will return true, once.
  // Called once.
  bool withdraw() { return state_.fetch_or(kWithdrawn) == 0; }

  // sums[T, dim] = every pair's rne(weight * y * 2^grid), added up, and bad as in expert_sums.
  // False, and nothing is written: an expert that is not here.  Between enter and leave.
  bool sums(const RoutedRows& call, int64_t* sums, uint8_t* bad);

  const ExpertShape& shape() const { return shape_; }

  // Experts 0 .. n - 1 are all here, and there are no others.
  bool is_whole(int n) const {
    return experts_.size() == size_t(n) &&
           std::find(experts_.begin(), experts_.end(), nullptr) == experts_.end();
  }

  // Experts that calls visited, each once a call.
  int64_t num_hits() const { return num_hits_.load(std::memory_order_relaxed); }

 private:
  static constexpr uint64_t kWithdrawn = 1, kCaller = 2;

  const ExpertShape shape_;
  const std::vector<const uint8_t*> experts_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> num_hits_{0};
};

}  // namespace shoal
