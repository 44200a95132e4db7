// A decoder layer but for its routed experts, in one call:
//
//   add the branch of the layer before, a float or a sum of integers -> norm -> q, k, v -> cache ->
//   attention -> add -> norm
//     -> the rows' experts and their form for them, or a dense FFN's branch
//
// What a layer does is written here and in the attention's file, and nowhere else.  Each step is a
// kernel of its own (docs/numerics.md): no bit depends on their sharing a call.
#pragma once
#include <cstdint>
#include <optional>

#include "attention.h"
#include "layer_grouped_query.h"
#include "layer_rows.h"
#include "matmul.h"

namespace shoal {

struct LayerRouter {
  Projection gate;  // [E, dim] float32
  int experts_per_token;
  bool renormalise;
};

struct LayerFfn {
  ExpertShape shape;
  const uint8_t* weights;
};

struct DecoderLayer {
  int64_t dim;
  float norm_eps;
  const float *attention_norm, *ffn_norm;  // [dim]
  GroupedQuery attention;
  std::optional<LayerRouter> router;  // none: nothing to choose
  Scheme scheme;                      // the experts'
  std::optional<LayerFfn> ffn;        // none: the layer has experts
};

// R: rows that go on.  Arrays are dense and do not overlap, but `residual` may be `hidden`.
struct LayerCall {
  const float* hidden;  // [rows][dim]
  const float* branch;  // [rows][dim] to be added to it first; null: none
  const int64_t* sums;  // [rows][dim]: the same as experts' integers (combine.h); null: none
  int sums_grid;
  RowPlaces places;
  KvCache cache;
  const int64_t* going_on;  // [R] rows that attend, ascending; null: all.  Each writes its K and V.
  int64_t num_going_on;
  float* residual;   // [R][dim]
  float* normed;     // [R][dim]: what the FFN or the experts take
  int8_t* quants;    // [R][P], P: dim padded to the scheme's span.  Only with experts of an
  float* scales;     // [R][P / span]                                int8 scheme.
  int32_t* experts;  // [R][experts_per_token].  Only with a router.
  float* weights;    // [R][experts_per_token]
  float* ffn;        // [R][dim].  Only with a dense FFN: its branch, still to be added.
};

// The call must have passed layer.attention.check.  Throws StoppedRows, in rows of the call.
void run_layer(const DecoderLayer& layer, const LayerCall& call);

}  // namespace shoal
