// Grouped-query attention of a decoder layer.  docs/numerics.md: this order of operations is part
// of the exactness contract.
#include "layer_grouped_query.h"

#include "floats.h"

namespace shoal {

Projection Projection::part(int first, int count) const {
  const MatrixView& m = matrix;
  const uint8_t* data = m.data + num_groups(first) * group_bytes(m.format, m.cols);
  return {{m.format, count, m.cols, data}, bias == nullptr ? nullptr : bias + first};
}

float* GroupedQuery::write_kv(Arena& arena, LayerRows& rows, const RowPlaces& places,
                              const KvCache& cache) const {
  const int64_t num_rows = places.rows;
  const int64_t q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim;
  float* const q_out = arena.take<float>(num_rows * (q_width + 2 * kv_width));
  float* const k_out = q_out + num_rows * q_width;
  float* const v_out = k_out + num_rows * kv_width;
  const auto project = [&](const Projection& p, float* out) {
    matmul(p.matrix, rows.under(scheme_of(p.matrix.format)), p.bias, out);
  };
  // The three lie one behind the other, so of one row their product is one: threads meet once.
  if (num_rows == 1 && qkv) {
    project(*qkv, q_out);
  } else {
    project(q, q_out);
    project(k, k_out);
    project(v, v_out);
  }
  turn(k_out, num_kv_heads, k_norm, places);
  if (clip) clamp_floats(v_out, *clip, v_out, num_rows * kv_width);
  const std::vector<int32_t> bad = kv_write(cache, k_out, v_out, places.slots, num_rows);
  if (!bad.empty()) throw StoppedRows{Stop::beyond_cache, bad};
  return q_out;
}

float* GroupedQuery::attend(Arena& arena, float* q_heads, const RowPlaces& places,
                            const KvCache& cache) const {
  turn(q_heads, num_heads, q_norm, places);
  const int64_t width = num_heads * head_dim;
  float* const mixed = arena.take<float>(places.rows * width);
  attention(cache, call(q_heads, mixed, places));
  float* const branch = arena.take<float>(places.rows * o.matrix.rows);
  LayerRows rows(arena, mixed, places.rows, width);
  matmul(o.matrix, rows.under(scheme_of(o.matrix.format)), o.bias, branch);
  return branch;
}

std::string GroupedQuery::check(const RowPlaces& places, const KvCache& cache) const {
  for (int64_t t = 0; t < places.rows; ++t)
    if (places.slots[t] < 0 || places.slots[t] >= cache.num_blocks * kKvBlockTokens)
      return "row " + std::to_string(t) + ": slot " + std::to_string(places.slots[t]) +
             " is outside the cache";
  return check_attention(cache, call(nullptr, nullptr, places));
}

AttentionCall GroupedQuery::call(const float* q_heads, float* out, const RowPlaces& places) const {
  return {q_heads,
          out,
          places.rows,
          num_heads,
          places.block_tables,
          places.sequences,
          places.blocks_per_sequence,
          places.sequence,
          places.position,
          scale,
          window};
}

// Norm, clip and rope of x[rows][heads][head_dim], in place.
void GroupedQuery::turn(float* x, int64_t heads, const float* norm, const RowPlaces& places) const {
  const int64_t width = heads * head_dim;
  if (norm != nullptr && norms_heads)
    rms_norm(x, norm, norm_eps, x, places.rows * heads, head_dim);
  else if (norm != nullptr)
    rms_norm(x, norm, norm_eps, x, places.rows, width);
  if (clip) clamp_floats(x, *clip, x, places.rows * width);
  rope(x, places.cos, places.sin, places.rows, heads, head_dim, places.half);
}

}  // namespace shoal
