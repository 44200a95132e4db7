// Python's door to decoder layers in a row with their experts, in memory or on nodes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bind_expert_table.h"
#include "bind_layer.h"
#include "bind_row_report.h"
#include "bindings.h"
#include "layer_run.h"
#include "layer_wires.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

// Presence in tables; it begins and ends with the GIL held.
class Stays {
 public:
  bool enter(BoundTable& table) {
    if (!table.table().enter()) return false;
    inside_.push_back(&table);
    return true;
  }
  ~Stays() {
    for (BoundTable* const table : inside_)
      if (table->table().leave()) table->end();
  }

 private:
  std::vector<BoundTable*> inside_;
};

using Caches = std::vector<std::tuple<Keys, Values>>;

// The experts that a row visits.
int experts_of(const DecoderLayer& layer, int num_experts) {
  return layer.router ? layer.router->experts_per_token : num_experts;
}

// Whether the table has just the experts that a layer may ask for.
bool fits(const DecoderLayer& layer, const ExpertTable& table, int num_experts) {
  return !layer.ffn && table.shape().dim == layer.dim &&
         scheme_of(table.shape().gate_up) == layer.scheme && table.is_whole(num_experts) &&
         (!layer.router || layer.router->gate.matrix.rows == num_experts);
}

// The arrays that every run has.
struct BoundRun {
  RunCall call;
  std::vector<RunLayer> layers;
  int64_t num_pairs = 0;
  int64_t room;  // for them

  BoundRun(const Array<const float, 2>& hidden, const OptionalRows<const float>& branch,
           const OptionalRows<const int64_t>& sums, int sums_grid, const BoundPlaces& places,
           const Array<float, 2>& residual, const Array<int64_t, 2>& expert_sums,
           const Array<int32_t, 1>& experts, const Array<double, 1>& expert_seconds)
      : room(int64_t(experts.size())) {
    const int64_t rows = places.places.rows, dim = int64_t(hidden.shape(1));
    require_equal("rows of hidden", rows, int64_t(hidden.shape(0)));
    require(same_shape(hidden, residual) && same_shape(hidden, expert_sums),
            "hidden, residual and expert_sums must have one shape");
    require(!branch || !sums, "a branch is floats or sums");
    require(sums_grid >= -126 && sums_grid <= 126, "sums: the grid must be in -126..126");
    call = {hidden.data(),
            rows_of("branch", branch, rows, dim, branch.has_value()),
            rows_of("sums", sums, rows, dim, sums.has_value()),
            sums_grid,
            places.places,
            residual.data(),
            expert_sums.data(),
            experts.data(),
            expert_seconds.data()};
    dim_ = dim;
  }

  void add(const DecoderLayer& layer, int num_experts, int grid, const KvCache& cache) {
    require_equal("columns of hidden", layer.dim, dim_);
    require(grid >= -100 && grid <= 100, "grid must be in -100..100");
    require_cache(layer, cache, call.places);
    require(!layer.ffn, "a layer without experts");
    const int each = experts_of(layer, num_experts);
    num_pairs += call.places.rows * each;
    layers.push_back({&layer, each, grid, cache});
  }

  // How many layers were done, and why the next one stopped; none: its experts did not.
  std::tuple<int, Stopped> run(LayerExperts& experts) const {
    for (const RunLayer& at : layers) require_places(*at.layer, at.cache, call.places);
    try {
      return {run_layers(layers, call, experts), std::nullopt};
    } catch (const StoppedLayer& at) {
      return {at.layer, std::make_tuple(int(at.rows.stop), at.rows.rows)};
    }
  }

 private:
  int64_t dim_;
};

std::tuple<int, Stopped> bind_run_layers(
    const std::vector<const BoundLayer*>& bound, const std::vector<BoundTable*>& tables,
    const std::vector<int>& num_experts, const std::vector<int>& grids,
    const Array<const float, 2>& hidden, const OptionalRows<const float>& branch,
    const OptionalRows<const int64_t>& sums, int sums_grid, const BoundPlaces& places,
    const Caches& caches, const Array<float, 2>& residual, const Array<int64_t, 2>& expert_sums,
    const Array<int32_t, 1>& experts, const Array<double, 1>& expert_seconds) {
  const size_t count = bound.size();
  require(tables.size() == count && num_experts.size() == count && grids.size() == count &&
              caches.size() == count && expert_seconds.size() == count,
          "layers: a table, a number of experts, a grid, a cache and a time each");
  BoundRun run(hidden, branch, sums, sums_grid, places, residual, expert_sums, experts,
               expert_seconds);
  std::vector<ExpertTable*> entered;
  Stays stays;
  for (size_t i = 0; i < count; ++i) {
    require(bound[i] != nullptr && tables[i] != nullptr, "layers and tables must not be None");
    const DecoderLayer& layer = bound[i]->layer;
    const KvCache cache = cache_of(std::get<0>(caches[i]), std::get<1>(caches[i]));
    require_equal("columns of hidden", layer.dim, int64_t(hidden.shape(1)));
    require_cache(layer, cache, places.places);
    if (!fits(layer, tables[i]->table(), num_experts[i]) || !stays.enter(*tables[i])) break;
    run.add(layer, num_experts[i], grids[i], cache);
    entered.push_back(&tables[i]->table());
  }
  require(run.num_pairs <= run.room, "experts: no room for those of every row");
  nb::gil_scoped_release released;
  ResidentExperts source(std::move(entered));
  return run.run(source);
}

// The owners of each layer's experts, as bind_run_layers_on_nodes takes them.
using Owners = Array<const int32_t, 1>;

std::vector<WiredLayer> wired(const std::vector<uint32_t>& numbers,
                              const std::vector<Owners>& owners,
                              const std::vector<int>& num_experts, const RowWires& wires) {
  std::vector<WiredLayer> layers;
  for (size_t i = 0; i < numbers.size(); ++i) {
    require(int64_t(owners[i].size()) >= num_experts[i], "an expert that has no owner");
    for (size_t k = 0; k < owners[i].size(); ++k)
      require(owners[i].data()[k] >= 0 && owners[i].data()[k] < wires.num_slots(),
              "an owner that is no slot");
    layers.push_back({numbers[i], owners[i].data()});
  }
  return layers;
}

// As bind_run_layers; `out` gets (seconds, report) of each fan-out.
std::tuple<int, Stopped> bind_run_layers_on_nodes(
    const std::vector<const BoundLayer*>& bound, const std::vector<int>& num_experts,
    const std::vector<int>& grids, const Array<const float, 2>& hidden,
    const OptionalRows<const float>& branch, const OptionalRows<const int64_t>& sums, int sums_grid,
    const BoundPlaces& places, const Caches& caches, const Array<float, 2>& residual,
    const Array<int64_t, 2>& expert_sums, const Array<int32_t, 1>& experts,
    const Array<double, 1>& expert_seconds, RowWires& wires, const std::vector<uint32_t>& numbers,
    const std::vector<Owners>& owners, uint64_t first_id, int num_ids, uint32_t deadline_ms,
    uint32_t reply_format, bool takes_bf16, double patience_s, double max_seconds,
    const Array<uint8_t, 1>& left_values, const Array<float, 1>& left_scales,
    const Array<float, 1>& left_weights, nb::list out) {
  const size_t count = bound.size();
  require(num_experts.size() == count && grids.size() == count && caches.size() == count &&
              expert_seconds.size() == count && numbers.size() == count && owners.size() == count,
          "layers: experts, a grid, a cache, a time, a number and owners each");
  require(kIsWireOrder, "this machine's byte order is not the wire's");
  require(places.places.rows == 1, "more than one row");
  BoundRun run(hidden, branch, sums, sums_grid, places, residual, expert_sums, experts,
               expert_seconds);
  const size_t dim = hidden.shape(1);
  require(left_values.size() >= std::max(4 * dim, size_t(round_up(int64_t(dim), 256))) &&
              left_scales.size() >= (dim + 31) / 32,
          "no room for what a row asks");
  for (size_t i = 0; i < count; ++i) {
    require(bound[i] != nullptr, "layers must not be None");
    const DecoderLayer& layer = bound[i]->layer;
    require(!layer.router || layer.router->gate.matrix.rows == num_experts[i],
            "a router of other experts");
    require(!takes_bf16 || (grids[i] >= -64 && grids[i] <= 96),
            "bf16: the grid must be in -64..96");
    run.add(layer, num_experts[i], grids[i],
            cache_of(std::get<0>(caches[i]), std::get<1>(caches[i])));
    require(run.layers.back().num_experts <= num_ids &&
                size_t(run.layers.back().num_experts) <= left_weights.size(),
            "too few ids, or no room for weights");
  }
  require(run.num_pairs <= run.room, "experts: no room for those of every row");
  const WiredCall call{{first_id, 0, deadline_ms, 0, 1, uint32_t(dim), reply_format},
                       num_ids,
                       takes_bf16,
                       patience_s,
                       max_seconds};
  WiredExperts source(wires, wired(numbers, owners, num_experts, wires), call,
                      {left_values.data(), left_scales.data(), left_weights.data()});
  std::tuple<int, Stopped> result;
  {
    nb::gil_scoped_release released;
    result = run.run(source);
  }
  for (const LayerReport& one : source.reports())
    out.append(nb::make_tuple(one.sent_after_s, report_of(one.sent, one.end, one.collected)));
  return result;
}

}  // namespace

void bind_layer_runs(nb::module_& m) {
  m.def("run_layers", &bind_run_layers, "layers"_a, "tables"_a, "num_experts"_a, "grids"_a,
        "hidden"_a.noconvert(), "branch"_a.noconvert().none(), "sums"_a.noconvert().none(),
        "sums_grid"_a, "places"_a, "caches"_a, "residual"_a.noconvert(),
        "expert_sums"_a.noconvert(), "experts"_a.noconvert(), "expert_seconds"_a.noconvert(),
        "Run layers with their experts; returns how many were done, and what stopped the next and "
        "the rows to blame, or None.");
  m.def("run_layers_on_nodes", &bind_run_layers_on_nodes, "layers"_a, "num_experts"_a, "grids"_a,
        "hidden"_a.noconvert(), "branch"_a.noconvert().none(), "sums"_a.noconvert().none(),
        "sums_grid"_a, "places"_a, "caches"_a, "residual"_a.noconvert(),
        "expert_sums"_a.noconvert(), "experts"_a.noconvert(), "expert_seconds"_a.noconvert(),
        "wires"_a, "numbers"_a, "owners"_a, "first_id"_a, "num_ids"_a, "deadline_ms"_a,
        "reply_format"_a, "takes_bf16"_a, "patience_s"_a, "max_seconds"_a,
        "left_values"_a.noconvert(), "left_scales"_a.noconvert(), "left_weights"_a.noconvert(),
        "out"_a,
        "Run layers of one row, their experts on nodes; as run_layers. Appended to `out`, one for "
        "each fan-out: (seconds since the run began, what RowWires.run reports). A last one that "
        "did not go well: what its row asks is left in the arrays.");
}

}  // namespace shoal
