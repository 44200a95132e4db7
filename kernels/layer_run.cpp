// Decoder layers in a row, each with its routed experts.
#include "layer_run.h"

#include <algorithm>
#include <chrono>

namespace shoal {
namespace {

// The calling thread's, beside the one that every layer empties.
Arena& empty_run_arena() {
  thread_local Arena arena;
  arena.reset();
  return arena;
}

struct Asked {  // of a layer's experts
  RowsView rows;
  int32_t *offsets, *experts;
  float* weights;
};

// Where run_layer leaves what it asks; without a router every expert is asked, with weight 1.
Asked prepare(const RunLayer& at, Arena& arena, int num_rows, int32_t* experts) {
  const DecoderLayer& layer = *at.layer;
  const int dim = int(layer.dim), pairs = num_rows * at.num_experts;
  Asked asked{
      {layer.scheme, num_rows, dim, arena.take<float>(int64_t(num_rows) * dim), nullptr, nullptr},
      arena.take<int32_t>(num_rows + 1),
      experts,
      arena.take<float>(pairs)};
  for (int row = 0; row <= num_rows; ++row) asked.offsets[row] = row * at.num_experts;
  if (layer.scheme != Scheme::f32) {
    const int64_t span = span_of(layer.scheme), padded = round_up(dim, span);
    asked.rows.quants = arena.take<int8_t>(num_rows * padded);
    asked.rows.scales = arena.take<float>(num_rows * (padded / span));
  }
  if (!layer.router) {
    std::fill_n(asked.weights, pairs, 1.0f);
    for (int i = 0; i < pairs; ++i) asked.experts[i] = i % at.num_experts;
  }
  return asked;
}

// Everything of one layer; false: its sums are not whole.
bool run(int index, const RunLayer& at, LayerCall& call, Arena& arena, int32_t* experts,
         const RunCall& run_call, LayerExperts& source) {
  const int num_rows = int(call.places.rows);
  const Asked asked = prepare(at, arena, num_rows, experts);
  call.cache = at.cache;
  call.normed = const_cast<float*>(asked.rows.floats);
  call.quants = const_cast<int8_t*>(asked.rows.quants);
  call.scales = const_cast<float*>(asked.rows.scales);
  call.experts = at.layer->router ? asked.experts : nullptr;
  call.weights = at.layer->router ? asked.weights : nullptr;
  run_layer(*at.layer, call);
  const auto began = std::chrono::steady_clock::now();
  uint8_t* const bad = arena.take<uint8_t>(num_rows);
  std::fill_n(bad, num_rows, uint8_t(0));
  const RoutedRows routed{asked.rows, asked.offsets, asked.experts, asked.weights, at.grid};
  const bool is_whole = source.sums(index, routed, run_call.expert_sums, bad);
  throw_marked(Stop::expert_output, bad, num_rows);
  run_call.expert_seconds[index] =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return is_whole;
}

}  // namespace

int run_layers(const std::vector<RunLayer>& layers, const RunCall& run_call, LayerExperts& source) {
  LayerCall call{};
  call.hidden = run_call.hidden;
  call.branch = run_call.branch;
  call.sums = run_call.sums;
  call.sums_grid = run_call.sums_grid;
  call.places = run_call.places;
  call.residual = run_call.residual;
  int32_t* experts = run_call.experts;
  for (int i = 0; i < int(layers.size()); ++i) {
    const RunLayer& at = layers[size_t(i)];
    if (i > 0 && !source.goes_on(i)) return i;
    try {
      if (!run(i, at, call, empty_run_arena(), experts, run_call, source)) return i;
    } catch (StoppedRows& rows) {
      throw StoppedLayer{i, std::move(rows)};
    }
    experts += run_call.places.rows * at.num_experts;
    call.hidden = run_call.residual;
    call.branch = nullptr;
    call.sums = run_call.expert_sums;
    call.sums_grid = at.grid;
  }
  return int(layers.size());
}

}  // namespace shoal
