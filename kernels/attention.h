// Grouped-query attention over a paged KV cache (exactness rule 6; docs/numerics.md).
//
// One layer's cache is two arrays of blocks of 64 tokens:
//   keys   [num_blocks][kv_heads][4][dim][16]   a lane is a key: scores need no horizontal sums
//   values [num_blocks][kv_heads][64][dim]      a lane is a dimension
// of float32 or of IEEE half.  Token p of a sequence is in block block_tables[sequence][p / 64].
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace shoal {

constexpr int kKvBlockTokens = 64;  // limits.KV_BLOCK_TOKENS
constexpr int kAttentionCut = 256;  // limits.ATTENTION_CUT
constexpr int kBlocksPerCut = kAttentionCut / kKvBlockTokens;
constexpr int kWidenedDims = 64;  // of 64 values: 16 KiB of floats, half a first-level cache

struct KvCache {
  void* keys;
  void* values;
  bool is_half;
  int64_t num_blocks, kv_heads, dim;
};

// Rounds k and v [rows][kv_heads][dim] to the cache's type and stores row t as token slots[t] % 64
// of block slots[t] / 64.  Returns the rows with a value that is not finite after rounding; those
// are not written.  Slots must be valid and distinct.
std::vector<int32_t> kv_write(const KvCache& cache, const float* k, const float* v,
                              const int32_t* slots, int64_t rows);

struct AttentionCall {
  const float* q;  // [rows][heads][dim]
  float* out;      // [rows][heads][dim], not overlapping q
  int64_t rows, heads;
  const int32_t* block_tables;  // [sequences][blocks_per_sequence]
  int64_t sequences, blocks_per_sequence;
  const int32_t* row_sequence;  // [rows]
  const int32_t* row_position;  // [rows]
  float scale;
  int64_t window;  // row t sees keys (position - window, position]; INT64_MAX: all up to position
};

// Empty, or what is wrong with the call: a sequence, position or block out of range.
std::string check_attention(const KvCache& cache, const AttentionCall& call);

// out[t][h] = softmax(scale * q[t][h] . K) V over the keys that row t sees.  The call must have
// passed check_attention.
void attention(const KvCache& cache, const AttentionCall& call);

// Queries of one kv head against one cut of 256 keys.
struct AttentionCut {
  const float* const* queries;  // [num_queries] of dim floats
  const int32_t* first;         // [num_queries] keys [first, end) of the cut are visible,
  const int32_t* end;           //               0 <= first, end <= 256; none if first >= end
  int num_queries;
  int dim;
  float scale;
  bool is_half;
  const void* keys[kBlocksPerCut];    // this head's [4][dim][16] of each block; null if not visible
  const void* values[kBlocksPerCut];  // this head's [64][dim]
  float* scores;                      // scratch [num_queries][256]
  float* widened;                     // scratch: 16 * max(dim, 64) floats
};

// What a cut, or several merged ones, contribute: sums of exp(score - max) * value.
struct AttentionPart {
  float* max;  // [num_queries]
  float* sum;  // [num_queries]; 0 where the query has seen no key
  float* out;  // [num_queries][dim rounded up to 16]
};

// One implementation for one instruction set, without threads.
struct AttentionTable {
  void (*cut)(const AttentionCut& cut, const AttentionPart& part);
  // into += part, where part covers later keys.
  void (*merge)(const AttentionPart& into, const AttentionPart& part, int num_queries, int dim);
  // out[i] = part.out[i] / part.sum of query j.
  void (*finish)(const AttentionPart& part, int j, int dim, float* out);
  // IEEE half of n floats, round to nearest even, overflow to infinity.
  void (*narrow)(const float* x, uint16_t* out, int64_t n);
};
extern const AttentionTable kAttentionScalar, kAttentionAvx2, kAttentionAvx512;

}  // namespace shoal
