// Grouped-query attention with rotary positions over the paged KV cache, as a decoder layer uses
// it: from normed rows to what is added to the residual.
//
// Multi-head attention is the case of as many KV heads as heads.  Another kind of attention is
// another class with these two functions (layer_decoder.h).
#pragma once
#include <cstdint>
#include <optional>

#include "attention.h"
#include "layer_rows.h"
#include "matmul.h"

namespace shoal {

// A matrix, and what its products begin with; bias may be null.
struct Projection {
  MatrixView matrix;
  const float* bias;

  // Rows [first, first + count) of it; first is at a row group's begin.
  Projection part(int first, int count) const;
};

struct GroupedQuery {
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
  int64_t window;             // keys a row sees, itself included; INT64_MAX: all
  std::optional<float> clip;  // q, k and v are cut to [-clip, clip], after the norm as OLMoE does
  float norm_eps;
  bool norms_heads;               // q_norm and k_norm are [head_dim]; else they span the projection
  const float *q_norm, *k_norm;   // null: none
  std::optional<Projection> qkv;  // q, k and v, whole row groups each, on top of each other
  Projection q, k, v, o;

  // Writes K and V of the rows to their slots; returns their q [rows][num_heads * head_dim].
  // Throws StoppedRows of those that are not finite or do not fit the cache's type.
  float* write_kv(Arena& arena, LayerRows& rows, const RowPlaces& places,
                  const KvCache& cache) const;

  // Returns the attention branch [rows][o.matrix.rows] of rows whose K and V are in the cache.
  // q: of write_kv, of all rows or of some; overwritten.  Throws StoppedRows.
  float* attend(Arena& arena, float* q, const RowPlaces& places, const KvCache& cache) const;

  // Empty, or what is wrong: a sequence, position or block out of range.
  std::string check(const RowPlaces& places, const KvCache& cache) const;

 private:
  AttentionCall call(const float* q, float* out, const RowPlaces& places) const;
  void turn(float* x, int64_t heads, const float* norm, const RowPlaces& places) const;
};

}  // namespace shoal
