// Decoder layers in a row, each with its routed experts, in one call: where these are all in
// memory, or on nodes.
//
// run_layer and the sums of experts one after the other, with their bits: Python's way between two
// calls is 30 to 60 us each time, its code evicted from the caches by the weights of a layer.
#pragma once
#include <utility>
#include <vector>

#include "expert_table.h"
#include "layer_decoder.h"

namespace shoal {

struct RunLayer {
  const DecoderLayer* layer;
  int num_experts;  // a row visits
  int grid;         // of their sums
  KvCache cache;
};

// Where the sums of a run's experts come from.
class LayerExperts {
 public:
  virtual ~LayerExperts() = default;
  // Whether a layer may begin; not asked of the first.
  virtual bool goes_on(int /*layer*/) { return true; }
  // As ExpertTable::sums.  False: they are not whole, and the run ends with this layer, routed.
  virtual bool sums(int layer, const RoutedRows& asked, int64_t* sums, uint8_t* bad) = 0;
};

class ResidentExperts : public LayerExperts {
 public:
  // The table of each layer: entered, and of all experts that the layer may ask for.
  explicit ResidentExperts(std::vector<ExpertTable*> tables) : tables_(std::move(tables)) {}
  bool sums(int layer, const RoutedRows& asked, int64_t* sums, uint8_t* bad) override {
    return tables_[size_t(layer)]->sums(asked, sums, bad);
  }

 private:
  std::vector<ExpertTable*> tables_;
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

// Every layer must have experts, and those it is given; places and caches must have passed
// layer.attention.check.  Returns of how many layers the sums are whole.  Throws StoppedLayer.
int run_layers(const std::vector<RunLayer>& layers, const RunCall& call, LayerExperts& experts);

}  // namespace shoal
