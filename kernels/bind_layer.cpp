// Python's door to whole decoder layers: what a layer is made of is checked once, when it is built,
// and its arrays are kept alive; a call checks what changes from call to call.
#include "bind_layer.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind_arrays.h"
#include "bind_views.h"
#include "bindings.h"
#include "floats.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

const float* data_of(const OptionalVector& vector) { return vector ? vector->data() : nullptr; }

BoundLinear linear_of(int format, int rows, int cols, const ConstBytes& data,
                      const OptionalVector& bias) {
  if (bias) require_equal("length of bias", rows, int64_t(bias->size()));
  return {{view_matrix(format, rows, cols, data), data_of(bias)}, data, bias};
}

void require_norms(const GroupedQuery& a, const OptionalVector& q_norm,
                   const OptionalVector& k_norm) {
  require(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm: both or none");
  if (!q_norm) return;
  const int64_t q = a.norms_heads ? 1 : a.num_heads, k = a.norms_heads ? 1 : a.num_kv_heads;
  require_equal("length of q_norm", q * a.head_dim, int64_t(q_norm->size()));
  require_equal("length of k_norm", k * a.head_dim, int64_t(k_norm->size()));
}

// qkv: one matrix of all rows, or three.  clip and window: 0 for none.
BoundAttention attention_of(int num_heads, int num_kv_heads, int head_dim, float scale,
                            int64_t window, float clip, float norm_eps, bool norms_heads,
                            const OptionalVector& q_norm, const OptionalVector& k_norm,
                            const std::vector<BoundLinear>& qkv, const BoundLinear& o) {
  require(num_kv_heads >= 1 && head_dim >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
          "attention: heads must be a multiple of KV heads");
  require(window >= 0 && clip >= 0.0f, "attention: window and clip must not be negative");
  GroupedQuery a{};
  a.num_heads = num_heads;
  a.num_kv_heads = num_kv_heads;
  a.head_dim = head_dim;
  a.scale = scale;
  a.window = window == 0 ? INT64_MAX : window;
  if (clip > 0.0f) a.clip = clip;
  a.norm_eps = norm_eps;
  a.norms_heads = norms_heads;
  a.q_norm = data_of(q_norm);
  a.k_norm = data_of(k_norm);
  require_norms(a, q_norm, k_norm);
  const int q_rows = num_heads * head_dim, kv_rows = num_kv_heads * head_dim;
  if (qkv.size() == 1) {
    require_equal("rows of q, k and v", q_rows + 2 * kv_rows, qkv[0].rows());
    require(q_rows % kLanes == 0 && kv_rows % kLanes == 0, "q, k and v: not whole row groups");
    a.qkv = qkv[0].projection;
    a.q = a.qkv->part(0, q_rows);
    a.k = a.qkv->part(q_rows, kv_rows);
    a.v = a.qkv->part(q_rows + kv_rows, kv_rows);
  } else {
    require_equal("matrices of q, k and v", 3, int64_t(qkv.size()));
    a.q = qkv[0].projection;
    a.k = qkv[1].projection;
    a.v = qkv[2].projection;
    require_equal("rows of q", q_rows, a.q.matrix.rows);
    require_equal("rows of k", kv_rows, a.k.matrix.rows);
    require_equal("rows of v", kv_rows, a.v.matrix.rows);
  }
  a.o = o.projection;
  require_equal("columns of o", q_rows, o.cols());
  for (const BoundLinear& one : qkv) require_equal("columns of q, k and v", o.rows(), one.cols());
  std::vector<BoundLinear> linears = qkv;
  linears.push_back(o);
  return {a, linears, q_norm, k_norm};
}

BoundPlaces places_of(const Array<const float, 2>& cos, const Array<const float, 2>& sin,
                      const Indices& slots, const Indices& row_sequence, const Indices& positions,
                      const Array<const int32_t, 2>& block_tables) {
  require(same_shape(cos, sin) && same_shape(slots, row_sequence) && same_shape(slots, positions) &&
              cos.shape(0) == slots.shape(0),
          "places: cos, sin, slots, row_sequence and positions must have one row each");
  return {{int64_t(slots.shape(0)), int64_t(cos.shape(1)), cos.data(), sin.data(), slots.data(),
           row_sequence.data(), positions.data(), block_tables.data(),
           int64_t(block_tables.shape(0)), int64_t(block_tables.shape(1))},
          cos,
          sin,
          slots,
          row_sequence,
          positions,
          block_tables};
}

BoundFfn ffn_of(int dim, int ffn_dim, int gate_up, int down, const ConstBytes& weights) {
  const ExpertShape shape = shape_from(dim, ffn_dim, gate_up, down);
  return {{shape, expert_data(shape, weights)}, weights};
}

LayerRouter router_of(const BoundLinear& gate, int64_t dim, int experts_per_token,
                      bool renormalise) {
  require(gate.projection.matrix.format == Format::f32, "router: must be float32");
  require_equal("columns of the router", dim, gate.cols());
  require(experts_per_token >= 1 && experts_per_token <= gate.rows() &&
              experts_per_token <= kMaxExpertsPerToken,
          "router: experts_per_token must be in 1..min(64, number of experts)");
  return {gate.projection, experts_per_token, renormalise};
}

BoundLayer layer_of(const Vector& attention_norm, const BoundAttention& attention,
                    const Vector& ffn_norm, const std::optional<BoundLinear>& gate,
                    int experts_per_token, bool renormalise, int scheme,
                    const std::optional<BoundFfn>& ffn) {
  const int64_t dim = attention.attention.o.matrix.rows;
  require_equal("length of the attention norm", dim, int64_t(attention_norm.size()));
  require_equal("length of the FFN norm", dim, int64_t(ffn_norm.size()));
  require(scheme >= 0 && scheme <= 2, "scheme: no such value");
  require(!gate || !ffn, "a layer has a router or a dense FFN");
  DecoderLayer layer{dim,
                     attention.attention.norm_eps,
                     attention_norm.data(),
                     ffn_norm.data(),
                     attention.attention,
                     std::nullopt,
                     Scheme(scheme),
                     std::nullopt};
  if (gate) layer.router = router_of(*gate, dim, experts_per_token, renormalise);
  if (ffn) {
    require_equal("dim of the FFN", dim, ffn->ffn.shape.dim);
    layer.ffn = ffn->ffn;
  }
  return {layer, attention, attention_norm, ffn_norm, gate, ffn};
}

void require_index(const std::optional<Array<const int64_t, 1>>& index, int64_t rows) {
  if (!index) return;
  for (size_t i = 0; i < index->size(); ++i)
    require(index->data()[i] >= 0 && index->data()[i] < rows &&
                (i == 0 || index->data()[i] > index->data()[i - 1]),
            "going_on must ascend within the rows");
}

// None, or why the layer stopped (shoal/ops/layers.py) and which rows of the call are to blame.
Stopped bind_run(const BoundLayer& bound, const Array<const float, 2>& hidden,
                 const OptionalRows<const float>& branch, const OptionalRows<const int64_t>& sums,
                 int sums_grid, const BoundPlaces& places, const Keys& keys, const Values& values,
                 const std::optional<Array<const int64_t, 1>>& going_on,
                 const Array<float, 2>& residual, const Array<float, 2>& normed,
                 const OptionalRows<int8_t>& quants, const OptionalRows<float>& scales,
                 const OptionalRows<int32_t>& experts, const OptionalRows<float>& weights,
                 const OptionalRows<float>& ffn) {
  const DecoderLayer& layer = bound.layer;
  const int64_t rows = places.places.rows, dim = layer.dim;
  const int64_t span = span_of(layer.scheme), padded = round_up(dim, span);
  const bool is_int8 = !layer.ffn && layer.scheme != Scheme::f32;
  const int64_t going = going_on ? int64_t(going_on->size()) : rows;
  const int64_t top = layer.router ? layer.router->experts_per_token : 0;
  require_equal("rows of hidden", rows, int64_t(hidden.shape(0)));
  require_equal("columns of hidden", dim, int64_t(hidden.shape(1)));
  require_index(going_on, rows);
  require(!branch || !sums, "a branch is floats or sums");
  require(sums_grid >= -126 && sums_grid <= 126, "sums: the grid must be in -126..126");
  const LayerCall call{hidden.data(),
                       rows_of("branch", branch, rows, dim, branch.has_value()),
                       rows_of("sums", sums, rows, dim, sums.has_value()),
                       sums_grid,
                       places.places,
                       cache_of(keys, values),
                       going_on ? going_on->data() : nullptr,
                       going,
                       rows_of<float>("residual", residual, going, dim),
                       rows_of<float>("normed", normed, going, dim),
                       rows_of("quants", quants, going, padded, is_int8),
                       rows_of("scales", scales, going, padded / span, is_int8),
                       rows_of("experts", experts, going, top, layer.router.has_value()),
                       rows_of("weights", weights, going, top, layer.router.has_value()),
                       rows_of("ffn", ffn, going, dim, layer.ffn.has_value())};
  require_cache(layer, call.cache, places.places);
  nb::gil_scoped_release released;
  require_places(layer, call.cache, places.places);
  try {
    run_layer(layer, call);
  } catch (const StoppedRows& bad) {
    return std::make_tuple(int(bad.stop), bad.rows);
  }
  return std::nullopt;
}

void bind_parts(nb::module_& m) {
  nb::class_<BoundLinear>(m, "Linear", "A matrix in kernel layout, and the bias of its products.")
      .def(nb::new_(&linear_of), "format"_a, "rows"_a, "cols"_a, "data"_a.noconvert(),
           "bias"_a.noconvert().none());
  nb::class_<BoundAttention>(m, "GroupedQuery", "The attention of one layer.")
      .def(nb::new_(&attention_of), "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a,
           "window"_a, "clip"_a, "norm_eps"_a, "norms_heads"_a, "q_norm"_a.noconvert().none(),
           "k_norm"_a.noconvert().none(), "qkv"_a, "o"_a);
  nb::class_<BoundFfn>(m, "DenseFfn", "An FFN in the layout of one expert.")
      .def(nb::new_(&ffn_of), "dim"_a, "ffn_dim"_a, "gate_up"_a, "down"_a, "weights"_a.noconvert());
  nb::class_<BoundPlaces>(m, "Places", "Where the rows of a pass stand.")
      .def(nb::new_(&places_of), "cos"_a.noconvert(), "sin"_a.noconvert(), "slots"_a.noconvert(),
           "row_sequence"_a.noconvert(), "positions"_a.noconvert(), "block_tables"_a.noconvert());
}

}  // namespace

void bind_layer(nb::module_& m) {
  bind_parts(m);
  nb::class_<BoundLayer>(m, "DecoderLayer", "A decoder layer but for its routed experts.")
      .def(nb::new_(&layer_of), "attention_norm"_a.noconvert(), "attention"_a,
           "ffn_norm"_a.noconvert(), "gate"_a.none(), "experts_per_token"_a, "renormalise"_a,
           "scheme"_a, "ffn"_a.none())
      .def_prop_ro("num_bytes", &BoundLayer::num_bytes, "Of its matrices.");
  m.def("run_layer", &bind_run, "layer"_a, "hidden"_a.noconvert(), "branch"_a.noconvert().none(),
        "sums"_a.noconvert().none(), "sums_grid"_a, "places"_a, "keys"_a.noconvert(),
        "values"_a.noconvert(), "going_on"_a.noconvert().none(), "residual"_a.noconvert(),
        "normed"_a.noconvert(), "quants"_a.noconvert().none(), "scales"_a.noconvert().none(),
        "experts"_a.noconvert().none(), "weights"_a.noconvert().none(), "ffn"_a.noconvert().none(),
        "Run it; returns what stopped it and the rows to blame, or None.");
}

}  // namespace shoal
