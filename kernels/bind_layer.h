// Decoder layers as Python holds them: with the arrays that they are made of.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_arrays.h"
#include "bind_views.h"
#include "layer_decoder.h"

namespace shoal {

using Vector = Array<const float, 1>;
using OptionalVector = std::optional<Vector>;
using Stopped = std::optional<std::tuple<int, std::vector<int32_t>>>;

struct BoundLinear {
  Projection projection;
  ConstBytes data;
  OptionalVector bias;

  int rows() const { return projection.matrix.rows; }
  int cols() const { return projection.matrix.cols; }
};

struct BoundAttention {
  GroupedQuery attention;
  std::vector<BoundLinear> linears;
  OptionalVector q_norm, k_norm;
};

struct BoundPlaces {
  RowPlaces places;
  Array<const float, 2> cos, sin;
  Indices slots, sequence, position;
  Array<const int32_t, 2> block_tables;
};

struct BoundFfn {
  LayerFfn ffn;
  ConstBytes weights;
};

struct BoundLayer {
  DecoderLayer layer;
  BoundAttention attention;
  Vector attention_norm, ffn_norm;
  std::optional<BoundLinear> gate;
  std::optional<BoundFfn> ffn;

  int64_t num_bytes() const {
    int64_t sum = int64_t(gate ? gate->data.size() : 0);
    for (const BoundLinear& one : attention.linears) sum += int64_t(one.data.size());
    return sum + int64_t(ffn ? ffn->weights.size() : 0);
  }
};

template <class T>
using OptionalRows = std::optional<Array<T, 2>>;

// The array's memory; it must be [rows, cols], or missing where `wanted` is false.
template <class T>
T* rows_of(const char* what, const OptionalRows<T>& array, int64_t rows, int64_t cols,
           bool wanted = true) {
  require(array.has_value() == wanted, what);
  if (!array) return nullptr;
  require_equal(what, rows, int64_t(array->shape(0)));
  require_equal(what, cols, int64_t(array->shape(1)));
  return array->data();
}

inline void require_cache(const DecoderLayer& layer, const KvCache& cache,
                          const RowPlaces& places) {
  const GroupedQuery& attention = layer.attention;
  require(cache.kv_heads == attention.num_kv_heads && cache.dim == attention.head_dim,
          "the cache is not this attention's: other heads");
  require(2 * places.half <= attention.head_dim, "more rotary dimensions than a head has");
}

inline void require_places(const DecoderLayer& layer, const KvCache& cache,
                           const RowPlaces& places) {
  const std::string wrong = layer.attention.check(places, cache);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
}

}  // namespace shoal
