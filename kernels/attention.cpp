// Threads of attention, and the paged cache's addresses.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu_features.h"
#include "exact_constants.h"
#include "isa_table.h"
#include "thread_pool.h"

namespace shoal {
namespace {

// Queries that go through a cut together: enough to pay for widening the keys, few enough that
// their scores (1 KiB each) and sums stay in the second-level cache.
constexpr int kQueriesTogether = 64;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kMacsWorthThreads = 200000;

const AttentionTable& table() { return SHOAL_ISA_TABLE(kAttention); }

// Rows [begin, end) of one sequence whose positions rise by at most one from row to row, so that
// the keys they see together, [first_key, end_key), have no gap.
struct RowSpan {
  int64_t begin, end;
  int64_t first_key, end_key;
  int64_t first_cut() const { return first_key / kAttentionCut; }
  int64_t num_cuts() const { return (end_key - 1) / kAttentionCut - first_cut() + 1; }
};

int64_t first_visible(const AttentionCall& call, int64_t row) {
  const int64_t position = call.row_position[row];
  return position < call.window ? 0 : position - call.window + 1;
}

std::vector<RowSpan> row_spans(const AttentionCall& call, int64_t group) {
  const int64_t max_rows = std::max<int64_t>(1, kQueriesTogether / group);
  std::vector<RowSpan> spans;
  for (int64_t t = 0; t < call.rows; ++t) {
    const int64_t position = call.row_position[t];
    const int64_t step = t > 0 ? position - call.row_position[t - 1] : 0;
    if (!spans.empty() && call.row_sequence[t] == call.row_sequence[t - 1] && step >= 0 &&
        step <= 1 && t - spans.back().begin < max_rows) {
      spans.back().end = t + 1;
      spans.back().end_key = position + 1;
    } else {
      spans.push_back({t, t + 1, first_visible(call, t), position + 1});
    }
  }
  return spans;
}

// Memory of the calling thread for one cut of one span.
struct Scratch {
  AttentionPart state, part;
  float *scores, *widened;
  const float** queries;
  int32_t *first, *end;

  Scratch(int64_t num_queries, int64_t dim) {
    const int64_t stride = (dim + kLanes - 1) / kLanes * kLanes;
    const int64_t widened_floats = std::max<int64_t>(kLanes * dim, kKvBlockTokens * kWidenedDims);
    const int64_t floats = num_queries * (kAttentionCut + 2 * stride + 4) + widened_floats;
    char* at = static_cast<char*>(
        thread_scratch(floats * 4 + num_queries * int64_t(sizeof(float*) + 8) + 1024));
    auto take = [&at](int64_t bytes) {
      char* taken = at;
      at += (bytes + 63) / 64 * 64;
      return taken;
    };
    auto take_floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
    scores = take_floats(num_queries * kAttentionCut);
    widened = take_floats(widened_floats);
    state.out = take_floats(num_queries * stride);
    part.out = take_floats(num_queries * stride);
    state.max = take_floats(num_queries);
    state.sum = take_floats(num_queries);
    part.max = take_floats(num_queries);
    part.sum = take_floats(num_queries);
    queries = reinterpret_cast<const float**>(take(num_queries * int64_t(sizeof(float*))));
    first = reinterpret_cast<int32_t*>(take(4 * num_queries));
    end = reinterpret_cast<int32_t*>(take(4 * num_queries));
  }
};

class Attention {
 public:
  Attention(const KvCache& cache, const AttentionCall& call)
      : cache_(cache),
        call_(call),
        table_(table()),
        group_(call.heads / cache.kv_heads),
        stride_((cache.dim + kLanes - 1) / kLanes * kLanes),
        spans_(row_spans(call, group_)) {}

  void run() const {
    const int64_t items = int64_t(spans_.size()) * cache_.kv_heads;
    int64_t macs = 0;
    for (const RowSpan& span : spans_)
      macs += (span.end - span.begin) * (span.end_key - span.first_key);
    macs *= 2 * call_.heads * cache_.dim;
    const int threads = macs < kMacsWorthThreads ? 1 : pool_threads();
    if (threads > 1 && items < 4 * threads)
      by_cuts();
    else
      parallel_for(items, threads > 1 ? 1 : items, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) whole(item);
      });
  }

 private:
  const RowSpan& span_of(int64_t item) const { return spans_[size_t(item / cache_.kv_heads)]; }
  int64_t head_of(int64_t item) const { return item % cache_.kv_heads; }
  int num_queries(const RowSpan& span) const { return int((span.end - span.begin) * group_); }

  // All cuts of one span and kv head, one after the other.
  void whole(int64_t item) const {
    const RowSpan& span = span_of(item);
    const int n = num_queries(span);
    Scratch scratch(n, cache_.dim);
    attend(span, head_of(item), span.first_cut(), scratch, scratch.state);
    for (int64_t cut = 1; cut < span.num_cuts(); ++cut) {
      attend(span, head_of(item), span.first_cut() + cut, scratch, scratch.part);
      table_.merge(scratch.state, scratch.part, n, int(cache_.dim));
    }
    finish(span, head_of(item), scratch.state);
  }

  // Few rows over many keys: threads share out the cuts, then merge them in ascending order.
  void by_cuts() const {
    struct Task {
      int64_t item, cut, at;  // at: floats from the start of `memory`
    };
    std::vector<Task> tasks;
    std::vector<size_t> first_task;
    int64_t floats = 0;
    for (int64_t item = 0; item < int64_t(spans_.size()) * cache_.kv_heads; ++item) {
      const RowSpan& span = span_of(item);
      first_task.push_back(tasks.size());
      for (int64_t cut = 0; cut < span.num_cuts(); ++cut) {
        tasks.push_back({item, span.first_cut() + cut, floats});
        floats +=
            num_queries(span) * stride_ + (2 * num_queries(span) + kLanes - 1) / kLanes * kLanes;
      }
    }
    first_task.push_back(tasks.size());
    const std::unique_ptr<float[]> memory(new float[size_t(floats)]);
    const auto part_of = [&](const Task& task) {
      const int n = num_queries(span_of(task.item));
      float* out = memory.get() + task.at;
      float* max = out + n * stride_;
      return AttentionPart{max, max + n, out};
    };
    parallel_for(int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = tasks[size_t(i)];
        const RowSpan& span = span_of(task.item);
        Scratch scratch(num_queries(span), cache_.dim);
        attend(span, head_of(task.item), task.cut, scratch, part_of(task));
      }
    });
    parallel_for(int64_t(first_task.size()) - 1, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t item = begin; item < end; ++item) {
        const RowSpan& span = span_of(item);
        const AttentionPart state = part_of(tasks[first_task[size_t(item)]]);
        for (size_t i = first_task[size_t(item)] + 1; i < first_task[size_t(item) + 1]; ++i)
          table_.merge(state, part_of(tasks[i]), num_queries(span), int(cache_.dim));
        finish(span, head_of(item), state);
      }
    });
  }

  void attend(const RowSpan& span, int64_t head, int64_t cut_index, const Scratch& scratch,
              const AttentionPart& part) const {
    const int64_t cut_key = cut_index * kAttentionCut;
    AttentionCut cut{};
    for (int64_t t = span.begin; t < span.end; ++t) {
      const int64_t first = std::max<int64_t>(first_visible(call_, t) - cut_key, 0);
      const int64_t end = std::min<int64_t>(call_.row_position[t] + 1 - cut_key, kAttentionCut);
      for (int64_t h = 0; h < group_; ++h) {
        const int64_t j = (t - span.begin) * group_ + h;
        scratch.queries[j] = call_.q + (t * call_.heads + head * group_ + h) * cache_.dim;
        scratch.first[j] = int32_t(std::min<int64_t>(first, kAttentionCut));
        scratch.end[j] = int32_t(std::max<int64_t>(end, 0));
      }
    }
    cut.queries = scratch.queries;
    cut.first = scratch.first;
    cut.end = scratch.end;
    cut.num_queries = num_queries(span);
    cut.dim = int(cache_.dim);
    cut.scale = call_.scale;
    cut.is_half = cache_.is_half;
    cut.scores = scratch.scores;
    cut.widened = scratch.widened;
    find_blocks(span, head, cut_key, cut);
    table_.cut(cut, part);
  }

  // Only blocks with a visible key are looked up: others may already belong to somebody else.
  void find_blocks(const RowSpan& span, int64_t head, int64_t cut_key, AttentionCut& cut) const {
    const int32_t* blocks =
        call_.block_tables + call_.row_sequence[span.begin] * call_.blocks_per_sequence;
    const int64_t width = cache_.is_half ? 2 : 4;
    for (int b = 0; b < kBlocksPerCut; ++b) {
      const int64_t key = cut_key + b * kKvBlockTokens;
      if (key >= span.end_key || key + kKvBlockTokens <= span.first_key) continue;
      const int64_t offset = (blocks[key / kKvBlockTokens] * cache_.kv_heads + head) *
                             kKvBlockTokens * cache_.dim * width;
      cut.keys[b] = static_cast<const char*>(cache_.keys) + offset;
      cut.values[b] = static_cast<const char*>(cache_.values) + offset;
    }
  }

  void finish(const RowSpan& span, int64_t head, const AttentionPart& state) const {
    for (int64_t t = span.begin; t < span.end; ++t)
      for (int64_t h = 0; h < group_; ++h)
        table_.finish(state, int((t - span.begin) * group_ + h), int(cache_.dim),
                      call_.out + (t * call_.heads + head * group_ + h) * cache_.dim);
  }

  const KvCache& cache_;
  const AttentionCall& call_;
  const AttentionTable& table_;
  const int64_t group_, stride_;
  const std::vector<RowSpan> spans_;
};

template <class T>
bool all_finite_bits(const T* bits, int64_t n, T exponent) {
  T bad = 0;
  for (int64_t i = 0; i < n; ++i) bad = T(bad | T((bits[i] & exponent) == exponent));
  return bad == 0;
}

// One token's rounded keys and values [kv_heads][dim] into its block.
template <class T>
void scatter(const KvCache& cache, const T* k, const T* v, int64_t slot) {
  const int64_t token = slot % kKvBlockTokens;
  for (int64_t h = 0; h < cache.kv_heads; ++h) {
    const int64_t block = (slot / kKvBlockTokens * cache.kv_heads + h) * kKvBlockTokens * cache.dim;
    T* keys = static_cast<T*>(cache.keys) + block + token / kLanes * kLanes * cache.dim;
    for (int64_t i = 0; i < cache.dim; ++i)
      keys[i * kLanes + token % kLanes] = k[h * cache.dim + i];
    T* values = static_cast<T*>(cache.values) + block + token * cache.dim;
    std::memcpy(values, v + h * cache.dim, size_t(cache.dim) * sizeof(T));
  }
}

bool write_row(const KvCache& cache, const float* k, const float* v, int64_t slot) {
  const int64_t n = cache.kv_heads * cache.dim;
  if (cache.is_half) {
    uint16_t* halves = static_cast<uint16_t*>(thread_scratch(4 * n));
    table().narrow(k, halves, n);
    table().narrow(v, halves + n, n);
    if (!all_finite_bits<uint16_t>(halves, 2 * n, 0x7C00)) return false;
    scatter(cache, halves, halves + n, slot);
    return true;
  }
  uint32_t* bits = static_cast<uint32_t*>(thread_scratch(8 * n));
  std::memcpy(bits, k, size_t(4 * n));
  std::memcpy(bits + n, v, size_t(4 * n));
  if (!all_finite_bits<uint32_t>(bits, 2 * n, 0x7F800000)) return false;
  scatter(cache, bits, bits + n, slot);
  return true;
}

}  // namespace

std::vector<int32_t> kv_write(const KvCache& cache, const float* k, const float* v,
                              const int32_t* slots, int64_t rows) {
  const int64_t n = cache.kv_heads * cache.dim;
  std::vector<uint8_t> bad(size_t(rows), 0);
  parallel_for(rows, std::max<int64_t>(1, 8192 / n), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      bad[size_t(t)] = !write_row(cache, k + t * n, v + t * n, slots[t]);
  });
  std::vector<int32_t> rows_bad;
  for (int64_t t = 0; t < rows; ++t)
    if (bad[size_t(t)]) rows_bad.push_back(int32_t(t));
  return rows_bad;
}

std::string check_attention(const KvCache& cache, const AttentionCall& call) {
  for (int64_t t = 0; t < call.rows; ++t) {
    const std::string row = "row " + std::to_string(t) + ": ";
    const int64_t sequence = call.row_sequence[t], position = call.row_position[t];
    if (sequence < 0 || sequence >= call.sequences)
      return row + "sequence " + std::to_string(sequence) + " has no block table";
    if (position < 0 || position / kKvBlockTokens >= call.blocks_per_sequence)
      return row + "position " + std::to_string(position) + " is outside its block table";
    const int32_t* blocks = call.block_tables + sequence * call.blocks_per_sequence;
    for (int64_t b = first_visible(call, t) / kKvBlockTokens; b <= position / kKvBlockTokens; ++b)
      if (blocks[b] < 0 || blocks[b] >= cache.num_blocks)
        return row + "block " + std::to_string(blocks[b]) + " is outside the cache";
  }
  return "";
}

void attention(const KvCache& cache, const AttentionCall& call) {
  if (call.rows > 0) Attention(cache, call).run();
}

}  // namespace shoal
