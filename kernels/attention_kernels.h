// The attention kernels, written once on Lanes; the rules of floats_kernels.h hold here too.
//
// Scores: lane = key, one fma chain over the head dimension per (query, key).  Values: lane =
// dimension, one fma chain over the keys per (query, dimension).  A tile of queries shares each
// load of keys or values; with few queries a tile takes several key groups or dimension blocks
// instead, so that there are always SHOAL_QUERY_TILE independent chains.
#pragma once
#include "attention.h"

namespace shoal {
namespace {

constexpr int kTile = SHOAL_QUERY_TILE;
constexpr int kGroupsPerCut = kAttentionCut / kLanes;
constexpr int kGroupsPerBlock = kKvBlockTokens / kLanes;

SHOAL_INLINE Lanes load_value(const float* p) { return load(p); }
SHOAL_INLINE Lanes load_value(const uint16_t* p) { return load_half(p); }
SHOAL_INLINE Lanes load_first_value(const float* p, int n) { return load_first(p, n); }
SHOAL_INLINE Lanes load_first_value(const uint16_t* p, int n) {
  uint16_t whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_half(whole);
}

SHOAL_INLINE int at_least(int a, int b) { return a > b ? a : b; }
SHOAL_INLINE int at_most(int a, int b) { return a < b ? a : b; }
SHOAL_INLINE int between(int x, int low, int high) { return at_most(at_least(x, low), high); }

// scores of Q queries for G groups of 16 keys.
template <int Q, int G, class T>
SHOAL_INLINE void score_tile(const float* const* queries, const T* const* groups, int dim,
                             float scale, float* scores) {
  Lanes sums[Q][G];
  for (int j = 0; j < Q; ++j)
    for (int g = 0; g < G; ++g) sums[j][g] = zero();
  for (int i = 0; i < dim; ++i) {
    Lanes key[G];
    for (int g = 0; g < G; ++g) key[g] = load_value(groups[g] + i * kLanes);
    for (int j = 0; j < Q; ++j) {
      const Lanes x = set1(queries[j][i]);
      for (int g = 0; g < G; ++g) sums[j][g] = fma(x, key[g], sums[j][g]);
    }
  }
  for (int j = 0; j < Q; ++j)
    for (int g = 0; g < G; ++g)
      store(scores + j * kAttentionCut + g * kLanes, mul(sums[j][g], set1(scale)));
}

// Q queries, groups [begin, end) of the cut.
template <int Q, class T>
void score_span(const float* const* queries, const T* const* groups, int begin, int end, int dim,
                float scale, float* scores) {
  constexpr int kTogether = kTile / Q;
  int g = begin;
  if constexpr (kTogether > 1)
    for (; g + kTogether <= end; g += kTogether)
      score_tile<Q, kTogether>(queries, groups + g, dim, scale, scores + g * kLanes);
  for (; g < end; ++g) score_tile<Q, 1>(queries, groups + g, dim, scale, scores + g * kLanes);
}

// clang-format off
// Calls `call(n)` with n as a constant, 1 <= n <= kTile.
#define SHOAL_TILE_CASE(n, call)   \
  case n:                          \
    call((n < kTile ? n : kTile)); \
    break;
#define SHOAL_EACH_TILE_SIZE(n, call)                     \
  switch (n) {                                            \
    SHOAL_TILE_CASE(1, call) SHOAL_TILE_CASE(2, call)     \
    SHOAL_TILE_CASE(3, call) SHOAL_TILE_CASE(4, call)     \
    SHOAL_TILE_CASE(5, call) SHOAL_TILE_CASE(6, call)     \
    SHOAL_TILE_CASE(7, call) SHOAL_TILE_CASE(8, call)     \
  }
// clang-format on
static_assert(kTile <= 8, "SHOAL_EACH_TILE_SIZE names every size");

// At most a tile of queries.
template <class T>
SHOAL_INLINE void score_some(int n, const float* const* queries, const T* const* groups, int begin,
                             int end, int dim, float scale, float* scores){
#define SHOAL_SCORE(Q) score_span<Q>(queries, groups, begin, end, dim, scale, scores)
    SHOAL_EACH_TILE_SIZE(n, SHOAL_SCORE)
#undef SHOAL_SCORE
}

SHOAL_INLINE const float* widen_keys(const float* group, int, float*) {
  return group;
}
SHOAL_INLINE const float* widen_keys(const uint16_t* group, int dim, float* widened) {
  for (int i = 0; i < dim; ++i) store(widened + i * kLanes, load_half(group + i * kLanes));
  return widened;
}

struct KeyRange {
  int begin, end;  // of the cut, begin < end
};

constexpr int kCacheLine = 64;

SHOAL_INLINE void prefetch(const void* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += kCacheLine)
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Asks for what comes after groups [g, g + count): the next keys, and these keys' values, which
// are read with a stride that hardware does not foresee (one row over 8k cold tokens: a tenth less
// time, AVX2, on a busy machine).
template <class T>
SHOAL_INLINE void prefetch_after(const AttentionCut& cut, const T* const* groups, int g, int count,
                                 int end) {
  const int64_t group_size = int64_t(kLanes) * cut.dim;
  for (int i = g; i < at_most(g + count, end); ++i)
    prefetch(
        static_cast<const T*>(cut.values[i / kGroupsPerBlock]) + i % kGroupsPerBlock * group_size,
        group_size * int64_t(sizeof(T)));
  for (int i = g + count; i < at_most(g + 2 * count, end); ++i)
    prefetch(groups[i], group_size * int64_t(sizeof(T)));
}

template <class T>
void score_cut(const AttentionCut& cut, KeyRange seen) {
  const T* groups[kGroupsPerCut];
  const int begin = seen.begin / kLanes, end = (seen.end + kLanes - 1) / kLanes;
  for (int g = begin; g < end; ++g)
    groups[g] = static_cast<const T*>(cut.keys[g / kGroupsPerBlock]) +
                g % kGroupsPerBlock * cut.dim * kLanes;
  if (cut.num_queries <= kTile) {
    for (int g = begin; g < end; g += kTile) {
      prefetch_after(cut, groups, g, kTile, end);
      score_some(cut.num_queries, cut.queries, groups, g, at_most(g + kTile, end), cut.dim,
                 cut.scale, cut.scores);
    }
    return;
  }
  // Many queries: a group is widened once and stays in the first-level cache for all of them.
  for (int g = begin; g < end; ++g) {
    prefetch_after(cut, groups, g, 1, end);
    const float* group = widen_keys(groups[g], cut.dim, cut.widened);
    for (int j = 0; j < cut.num_queries; j += kTile)
      score_some(at_most(kTile, cut.num_queries - j), cut.queries + j, &group, 0, 1, cut.dim,
                 cut.scale, cut.scores + j * kAttentionCut + g * kLanes);
  }
}

// scores[first, end) become exp(score - max); partial sums by key index mod 16.
SHOAL_INLINE void exponentiate(float* scores, int first, int end, float* max_out, float* sum_out) {
  const int begin_group = first / kLanes * kLanes;
  Lanes highest = set1(-__builtin_inff());
  for (int k = begin_group; k < end; k += kLanes)
    highest = max(keep_range(load(scores + k), between(first - k, 0, kLanes),
                             between(end - k, 0, kLanes), -__builtin_inff()),
                  highest);
  *max_out = fold_max(highest);
  const Lanes top = set1(*max_out);
  Lanes sums = zero();
  for (int k = begin_group; k < end; k += kLanes) {
    const Lanes e = keep_range(exp(sub(load(scores + k), top)), between(first - k, 0, kLanes),
                               between(end - k, 0, kLanes), 0.0f);
    store(scores + k, e);
    sums = add(sums, e);
  }
  *sum_out = fold_sum(sums);
}

// Where the values of one block of 64 keys and one or more blocks of 16 dimensions are.
template <class T>
struct Values {
  const T* at;  // key 0
  int key_stride, block_stride;
};

// out[j] += sum over keys [begin, end) of weights[j][key] * values[key], B blocks of 16 dimensions.
template <int Q, int B, class T>
SHOAL_INLINE void value_tile(const float* weights, Values<T> values, int begin, int end, float* out,
                             int out_stride) {
  Lanes sums[Q][B];
  for (int j = 0; j < Q; ++j)
    for (int b = 0; b < B; ++b) sums[j][b] = load(out + j * out_stride + b * kLanes);
  for (int k = begin; k < end; ++k) {
    Lanes value[B];
    for (int b = 0; b < B; ++b)
      value[b] = load_value(values.at + k * values.key_stride + b * values.block_stride);
    for (int j = 0; j < Q; ++j) {
      const Lanes w = set1(weights[j * kAttentionCut + k]);
      for (int b = 0; b < B; ++b) sums[j][b] = fma(w, value[b], sums[j][b]);
    }
  }
  for (int j = 0; j < Q; ++j)
    for (int b = 0; b < B; ++b) store(out + j * out_stride + b * kLanes, sums[j][b]);
}

// Q queries with the same keys [begin, end), `blocks` blocks of 16 dimensions.
template <int Q, class T>
void value_span(const float* weights, Values<T> values, int begin, int end, int blocks, float* out,
                int out_stride) {
  constexpr int kTogether = kTile / Q;
  int b = 0;
  if constexpr (kTogether > 1)
    for (; b + kTogether <= blocks; b += kTogether, values.at += kTogether * values.block_stride)
      value_tile<Q, kTogether>(weights, values, begin, end, out + b * kLanes, out_stride);
  for (; b < blocks; ++b, values.at += values.block_stride)
    value_tile<Q, 1>(weights, values, begin, end, out + b * kLanes, out_stride);
}

template <class T>
SHOAL_INLINE void value_some(int n, const float* weights, Values<T> values, int begin, int end,
                             int blocks, float* out, int out_stride) {
#define SHOAL_VALUE(Q) value_span<Q>(weights, values, begin, end, blocks, out, out_stride)
  SHOAL_EACH_TILE_SIZE(n, SHOAL_VALUE)
#undef SHOAL_VALUE
}

// At most a tile of queries and one block of keys; keys that a query does not see are not visited.
// first and end are relative to the block.
template <class T>
void value_block(int n, const float* weights, Values<T> values, const int32_t* first,
                 const int32_t* end, int block_key, int blocks, float* out, int out_stride) {
  int begins[kTile], ends[kTile], common_begin = 0, common_end = kKvBlockTokens;
  for (int j = 0; j < n; ++j) {
    begins[j] = between(first[j] - block_key, 0, kKvBlockTokens);
    ends[j] = between(end[j] - block_key, 0, kKvBlockTokens);
    common_begin = at_least(common_begin, begins[j]);
    common_end = at_most(common_end, ends[j]);
  }
  if (common_begin >= common_end) common_begin = common_end = kKvBlockTokens;
  for (int j = 0; j < n; ++j)
    if (begins[j] < at_most(common_begin, ends[j]))
      value_span<1>(weights + j * kAttentionCut, values, begins[j], at_most(common_begin, ends[j]),
                    blocks, out + j * out_stride, out_stride);
  if (common_begin >= common_end) return;
  value_some(n, weights, values, common_begin, common_end, blocks, out, out_stride);
  for (int j = 0; j < n; ++j)
    if (common_end < ends[j])
      value_span<1>(weights + j * kAttentionCut, values, common_end, ends[j], blocks,
                    out + j * out_stride, out_stride);
}

// Keys [begin, end) of a block, `dims` dimensions from `values` on, as blocks of [64][16] floats.
template <class T>
SHOAL_INLINE Values<float> widen_values(const T* values, int dim, int dims, int begin, int end,
                                        float* widened) {
  constexpr int kBlockStride = kKvBlockTokens * kLanes;
  const int whole = dims / kLanes, tail = dims % kLanes;
  for (int k = begin; k < end; ++k) {
    const T* from = values + int64_t(k) * dim;
    float* to = widened + k * kLanes;
    for (int b = 0; b < whole; ++b) store(to + b * kBlockStride, load_value(from + b * kLanes));
    if (tail > 0) store(to + whole * kBlockStride, load_first_value(from + whole * kLanes, tail));
  }
  return {widened, kLanes, kBlockStride};
}

template <class T>
void value_cut(const AttentionCut& cut, KeyRange seen, float* out) {
  const int whole = cut.dim / kLanes * kLanes;
  const int out_stride = (cut.dim + kLanes - 1) / kLanes * kLanes;
  const bool few = cut.num_queries <= kTile;
  for (int block = seen.begin / kKvBlockTokens; block * kKvBlockTokens < seen.end; ++block) {
    const int block_key = block * kKvBlockTokens;
    const T* values = static_cast<const T*>(cut.values[block]);
    const int begin = between(seen.begin - block_key, 0, kKvBlockTokens);
    const int end = between(seen.end - block_key, 0, kKvBlockTokens);
    const float* weights = cut.scores + block_key;
    if (few)
      value_block(cut.num_queries, weights, Values<T>{values, cut.dim, kLanes}, cut.first, cut.end,
                  block_key, whole / kLanes, out, out_stride);
    // Many queries: some dimensions of the block are widened once for all of them.
    for (int i = few ? whole : 0; i < cut.dim; i += kWidenedDims) {
      const int dims = at_most(kWidenedDims, cut.dim - i);
      const Values<float> some = widen_values(values + i, cut.dim, dims, begin, end, cut.widened);
      for (int j = 0; j < cut.num_queries; j += kTile)
        value_block(at_most(kTile, cut.num_queries - j), weights + j * kAttentionCut, some,
                    cut.first + j, cut.end + j, block_key, (dims + kLanes - 1) / kLanes,
                    out + j * out_stride + i, out_stride);
    }
  }
}

void attend_cut(const AttentionCut& cut, const AttentionPart& part) {
  KeyRange seen = {kAttentionCut, 0};
  for (int j = 0; j < cut.num_queries; ++j)
    if (cut.first[j] < cut.end[j])
      seen = {at_most(seen.begin, cut.first[j]), at_least(seen.end, cut.end[j])};
  const int stride = (cut.dim + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < int64_t(cut.num_queries) * stride; i += kLanes)
    store(part.out + i, zero());
  for (int j = 0; j < cut.num_queries; ++j) part.max[j] = part.sum[j] = 0.0f;
  if (seen.begin >= seen.end) return;
  if (cut.is_half)
    score_cut<uint16_t>(cut, seen);
  else
    score_cut<float>(cut, seen);
  for (int j = 0; j < cut.num_queries; ++j)
    if (cut.first[j] < cut.end[j])
      exponentiate(cut.scores + j * kAttentionCut, cut.first[j], cut.end[j], part.max + j,
                   part.sum + j);
  if (cut.is_half)
    value_cut<uint16_t>(cut, seen, part.out);
  else
    value_cut<float>(cut, seen, part.out);
}

SHOAL_INLINE float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

void merge_parts(const AttentionPart& into, const AttentionPart& part, int num_queries, int dim) {
  const int stride = (dim + kLanes - 1) / kLanes * kLanes;
  for (int j = 0; j < num_queries; ++j) {
    if (part.sum[j] == 0.0f) continue;  // no key seen
    float* out = into.out + int64_t(j) * stride;
    const float* more = part.out + int64_t(j) * stride;
    if (into.sum[j] == 0.0f) {
      into.max[j] = part.max[j];
      into.sum[j] = part.sum[j];
      for (int i = 0; i < stride; i += kLanes) store(out + i, load(more + i));
      continue;
    }
    const float top = part.max[j] > into.max[j] ? part.max[j] : into.max[j];
    const float a = exp_one(into.max[j] - top), b = exp_one(part.max[j] - top);
    into.max[j] = top;
    into.sum[j] = into.sum[j] * a + part.sum[j] * b;
    for (int i = 0; i < stride; i += kLanes)
      store(out + i, add(mul(load(out + i), set1(a)), mul(load(more + i), set1(b))));
  }
}

void finish_query(const AttentionPart& part, int j, int dim, float* out) {
  const int stride = (dim + kLanes - 1) / kLanes * kLanes;
  const float* sums = part.out + int64_t(j) * stride;
  const Lanes sum = set1(part.sum[j]);
  for (int i = 0; i < dim; i += kLanes)
    store_first(out + i, div(load(sums + i), sum), at_most(dim - i, kLanes));
}

void narrow_values(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_half(out + i, load(x + i));
  if (i < n) {
    uint16_t last[kLanes];
    store_half(last, load_first(x + i, int(n - i)));
    for (int64_t j = i; j < n; ++j) out[j] = last[j - i];
  }
}

constexpr AttentionTable kAttentionTable = {attend_cut, merge_parts, finish_query, narrow_values};

}  // namespace
}  // namespace shoal
