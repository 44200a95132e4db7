// Decoder layers in a row, each with its routed experts, in one call: where these are all in
// memory.
//
// run_layer and ExpertTable::sums one after the other, with their bits: Python's way between two
// calls is 30 to 60 us each time, its code evicted from the caches by the weights of a layer.
#pragma once
#include <vector>

#include "expert_table.h"
#include "layer_decoder.h"

namespace shoal {

struct ResidentLayer {
  const DecoderLayer* layer;
  ExpertTable* table;  // entered; of all experts that the layer may ask for
  int num_experts;     // a row visits
  int grid;            // of their sums
  KvCache cache;
};

struct RunCall {
  const float* hidden;  // [rows][dim], branch and sums: as in LayerCall, of the first layer
  const float* branch;
  const int64_t* sums;
  int sums_grid;
  RowPlaces places;
  float* residual;         // [rows][dim] after the last layer, its experts' sums still to be added;
  int64_t* expert_sums;    // [rows][dim]: these
  int32_t* experts;        // [rows][num_experts] of each layer, one behind the other
  double* expert_seconds;  // [layers]: what its experts took
};

struct StoppedLayer {
  int layer;  // of the run
  StoppedRows rows;
};

// Every layer must have experts and fit its table; places and caches must have passed
// layer.attention.check.  Throws StoppedLayer.
void run_layers(const std::vector<ResidentLayer>& layers, const RunCall& call);

}  // namespace shoal
