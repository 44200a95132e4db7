// A decoder layer but for its routed experts.
#include "layer_decoder.h"

#include <cstring>

#include "combine.h"
#include "floats.h"
#include "thread_pool.h"

namespace shoal {
namespace {

void route(const DecoderLayer& layer, const LayerCall& call, Arena& arena, LayerRows& rows) {
  rows.under(layer.scheme, call.quants, call.scales);
  if (!layer.router) return;
  const LayerRouter& router = *layer.router;
  const int num_experts = router.gate.matrix.rows;
  float* const logits = arena.take<float>(rows.num_rows() * num_experts);
  matmul(router.gate.matrix, rows.under(Scheme::f32), router.gate.bias, logits);
  const std::vector<int32_t> bad =
      route_softmax(logits, rows.num_rows(), num_experts, router.experts_per_token,
                    router.renormalise, call.experts, call.weights);
  if (!bad.empty()) throw StoppedRows{Stop::router_logit, bad};
}

void compute_ffn(const LayerFfn& ffn, float* out, Arena& arena, LayerRows& rows) {
  const RowsView& view = rows.under(scheme_of(ffn.shape.gate_up));
  uint8_t* const bad = arena.take<uint8_t>(rows.num_rows());
  std::memset(bad, 0, size_t(rows.num_rows()));
  expert_ffn(ffn.shape, ffn.weights, view, out, bad);
  throw_marked(Stop::ffn_output, bad, rows.num_rows());
}

// From where K and V of all rows are in the cache; hidden and q are those of the rows going on.
void finish(const DecoderLayer& layer, const LayerCall& call, Arena& arena, const float* hidden,
            float* q, const RowPlaces& places) {
  const float* branch = layer.attention.attend(arena, q, places, call.cache);
  add_floats(hidden, branch, call.residual, places.rows * layer.dim);
  rms_norm(call.residual, layer.ffn_norm, layer.norm_eps, call.normed, places.rows, layer.dim);
  LayerRows rows(arena, call.normed, places.rows, layer.dim);
  if (layer.ffn)
    compute_ffn(*layer.ffn, call.ffn, arena, rows);
  else
    route(layer, call, arena, rows);
}

// The residual that the layer begins with.
const float* with_branch(const LayerCall& call, Arena& arena, int64_t values) {
  const float* branch = call.branch;
  if (call.sums != nullptr) {
    float* const finished = arena.take<float>(values);
    finish_sums(call.sums, call.sums_grid, finished, values);
    branch = finished;
  }
  if (branch == nullptr) return call.hidden;
  float* const sum = call.going_on == nullptr ? call.residual : arena.take<float>(values);
  add_floats(call.hidden, branch, sum, values);
  return sum;
}

}  // namespace

void run_layer(const DecoderLayer& layer, const LayerCall& call) {
  prepare_threads();  // after a wait for nodes they sleep; they wake beside the norm
  Arena& arena = empty_thread_arena();
  const int64_t rows = call.places.rows, values = rows * layer.dim;
  const float* const hidden = with_branch(call, arena, values);
  float* const normed = arena.take<float>(values);
  rms_norm(hidden, layer.attention_norm, layer.norm_eps, normed, rows, layer.dim);
  LayerRows normed_rows(arena, normed, rows, layer.dim);
  float* const q = layer.attention.write_kv(arena, normed_rows, call.places, call.cache);
  if (call.going_on == nullptr) {
    finish(layer, call, arena, hidden, q, call.places);
    return;
  }
  const int64_t* const index = call.going_on;
  const int64_t count = call.num_going_on;
  if (count == 0) return;
  const int64_t q_width = layer.attention.num_heads * layer.attention.head_dim;
  const RowPlaces places = gathered(arena, call.places, index, count);
  try {
    finish(layer, call, arena, gathered(arena, hidden, layer.dim, index, count),
           gathered(arena, q, q_width, index, count), places);
  } catch (StoppedRows& bad) {
    for (int32_t& row : bad.rows) row = int32_t(index[row]);
    throw;
  }
}

}  // namespace shoal
