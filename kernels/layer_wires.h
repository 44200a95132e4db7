// The experts of a run's layers on nodes: each layer's single row is a fan-out of wire_fanout.h.
//
// The run goes on from layer to layer while every fan-out goes well.  It ends at the first that
// does not: what the row asks of that layer is left for Python, with what came of it.
#pragma once
#include <chrono>
#include <vector>

#include "layer_run.h"
#include "wire_fanout.h"

namespace shoal {

// A layer as nodes know it.  owners: the slot of each of its experts.
struct WiredLayer {
  uint32_t layer;
  const int32_t* owners;
};

// What is asked of every layer alike.  head: with the id of the first layer's first call; each
// layer has `num_ids`.  patience_s: for the replies of a layer.  max_seconds: no layer begins
// later.
struct WiredCall {
  CallHead head;
  int num_ids;
  bool takes_bf16;
  double patience_s, max_seconds;
};

// Memory for what the last layer's row asks, as in RoutedRows.
struct LeftRow {
  uint8_t* values;
  float* scales;
  float* weights;
};

// What came of a layer's fan-out, sent that long after the run began.
struct LayerReport {
  double sent_after_s;
  std::vector<SentCall> sent;
  std::vector<Collected> collected;
  CollectEnd end;
};

class WiredExperts : public LayerExperts {
 public:
  WiredExperts(RowWires& wires, std::vector<WiredLayer> layers, const WiredCall& call,
               const LeftRow& left)
      : wires_(wires), layers_(std::move(layers)), call_(call), left_(left) {}

  bool goes_on(int) override { return elapsed_s() < call_.max_seconds; }
  bool sums(int layer, const RoutedRows& asked, int64_t* sums, uint8_t* bad) override;

  const std::vector<LayerReport>& reports() const { return reports_; }

 private:
  using Clock = std::chrono::steady_clock;
  double elapsed_s() const { return std::chrono::duration<double>(Clock::now() - began_).count(); }

  RowWires& wires_;
  std::vector<WiredLayer> layers_;
  WiredCall call_;
  LeftRow left_;
  Clock::time_point began_ = Clock::now();
  std::vector<LayerReport> reports_;
};

}  // namespace shoal
