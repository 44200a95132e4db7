// What the doors to Python check alike: arrays by dtype and layout, and that they are rows.  Every
// function throws what becomes a ValueError or TypeError.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "matmul.h"
#include "quantise.h"

namespace shoal {

template <class T, int N>
using Array = nanobind::ndarray<T, nanobind::numpy, nanobind::ndim<N>, nanobind::c_contig,
                                nanobind::device::cpu>;
using ConstBytes = Array<const uint8_t, 1>;
using ConstFloats = Array<const float, 2>;
using Indices = Array<const int32_t, 1>;
using ActivationArray = nanobind::ndarray<nanobind::numpy, nanobind::ro, nanobind::ndim<2>,
                                          nanobind::c_contig, nanobind::device::cpu>;
using BadRows = std::vector<int>;

inline BadRows indices_of(const std::vector<uint8_t>& bad) {
  BadRows rows;
  for (size_t i = 0; i < bad.size(); ++i)
    if (bad[i]) rows.push_back(int(i));
  return rows;
}

inline void require(bool ok, const char* what) {
  if (!ok) throw nanobind::value_error(what);
}

inline std::string got(const char* what, int64_t expected, int64_t actual) {
  return std::string(what) + ": expected " + std::to_string(expected) + ", got " +
         std::to_string(actual);
}

inline void require_equal(const char* what, int64_t expected, int64_t actual) {
  if (expected != actual) throw nanobind::value_error(got(what, expected, actual).c_str());
}

inline void require_below(const char* what, int64_t limit, int64_t actual) {
  if (actual < 0 || actual >= limit) throw nanobind::value_error(got(what, limit, actual).c_str());
}

inline Format format_from(int value) {
  require(value >= 0 && value < kNumFormats, "format: no such value");
  return Format(value);
}

inline void require_dims(int rows, int cols) {
  require(rows >= 0 && cols >= 1 && cols < (1 << 24), "matrix: rows >= 0 and 1 <= cols < 2^24");
}

inline void require_aligned(const void* data) {
  require(reinterpret_cast<uintptr_t>(data) % 64 == 0,
          "weights must begin at a 64-byte boundary: use aligned_empty");
}

inline RowsView view_rows(int scheme, int dim, const ActivationArray& values,
                          const ConstFloats& scales) {
  require(scheme >= 0 && scheme <= 2, "scheme: no such value");
  RowsView rows{Scheme(scheme), int(values.shape(0)), dim, nullptr, nullptr, scales.data()};
  const int64_t span = span_of(rows.scheme), padded = round_up(dim, span);
  require_equal("columns of the rows", padded, int64_t(values.shape(1)));
  require_equal("rows of the scales", rows.num_rows, int64_t(scales.shape(0)));
  if (rows.scheme == Scheme::f32) {
    if (values.dtype() != nanobind::dtype<float>())
      throw nanobind::type_error("rows: expected float32");
    rows.floats = static_cast<const float*>(values.data());
  } else {
    if (values.dtype() != nanobind::dtype<int8_t>())
      throw nanobind::type_error("rows: expected int8");
    require_equal("scales of a row", padded / span, int64_t(scales.shape(1)));
    rows.quants = static_cast<const int8_t*>(values.data());
  }
  return rows;
}

inline ExpertShape shape_from(int dim, int ffn_dim, int gate_up, int down) {
  require_dims(1, dim);
  require_dims(1, ffn_dim);
  return ExpertShape{dim, ffn_dim, format_from(gate_up), format_from(down)};
}

inline const uint8_t* expert_data(const ExpertShape& shape, const ConstBytes& weights) {
  require_equal("bytes of an expert", shape.bytes(), int64_t(weights.size()));
  require_aligned(weights.data());
  return weights.data();
}

}  // namespace shoal
