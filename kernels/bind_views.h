// Weights and KV caches from Python as kernels see them, checked.
#pragma once
#include "attention.h"
#include "bind_arrays.h"
#include "matmul.h"

namespace shoal {

template <class A, class B>
bool same_shape(const A& a, const B& b) {
  if (a.ndim() != b.ndim()) return false;
  for (size_t i = 0; i < a.ndim(); ++i)
    if (a.shape(i) != b.shape(i)) return false;
  return true;
}

inline MatrixView view_matrix(int format, int rows, int cols, const ConstBytes& data) {
  require_dims(rows, cols);
  const MatrixView m{format_from(format), rows, cols, data.data()};
  require_equal("matrix bytes", num_groups(rows) * group_bytes(m.format, cols),
                int64_t(data.size()));
  require_aligned(data.data());
  return m;
}

// Of float32 or float16, which cache_of checks: keys and values together.
using Keys = nanobind::ndarray<nanobind::numpy, nanobind::shape<-1, -1, 4, -1, 16>,
                               nanobind::c_contig, nanobind::device::cpu>;
using Values = nanobind::ndarray<nanobind::numpy, nanobind::shape<-1, -1, 64, -1>,
                                 nanobind::c_contig, nanobind::device::cpu>;

inline KvCache cache_of(const Keys& keys, const Values& values) {
  using nanobind::dlpack::dtype_code;
  const bool is_half = keys.dtype() == nanobind::dlpack::dtype{uint8_t(dtype_code::Float), 16, 1};
  if (keys.dtype() != values.dtype() || !(is_half || keys.dtype() == nanobind::dtype<float>()))
    throw nanobind::type_error("KV cache: keys and values must both be float32 or both be float16");
  require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1) &&
              keys.shape(3) == values.shape(3) && keys.shape(1) > 0 && keys.shape(3) > 0,
          "KV cache: keys [N, KVH, 4, d, 16] and values [N, KVH, 64, d] do not belong together");
  return KvCache{
      keys.data(),           values.data(), is_half, int64_t(keys.shape(0)), int64_t(keys.shape(1)),
      int64_t(keys.shape(3))};
}

}  // namespace shoal
