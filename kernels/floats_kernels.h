// The float kernels, written once on Lanes.  A floats_*.cpp includes one lanes_*.h, then this.
//
// Nothing here may use the standard library's templates or inline functions: the linker keeps one
// copy of such a function, perhaps the one compiled for AVX-512, and every CPU would run it.
#pragma once
#include "floats.h"

namespace shoal {
namespace {

SHOAL_INLINE int lanes_left(int64_t n, int64_t i) { return n - i < kLanes ? int(n - i) : kLanes; }

void rms_norm_rows(const float* x, const float* w, float eps, float* out, int64_t rows,
                   int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t t = 0; t < rows; ++t, x += dim, out += dim) {
    Lanes squares = zero();
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Lanes v = load(x + i);
      squares = fma(v, v, squares);
    }
    if (whole < dim) {
      const Lanes v = load_first(x + whole, int(dim - whole));
      squares = fma(v, v, squares);  // the lanes beyond dim add 0 * 0: their partials stay
    }
    const float mean = fold_sum(squares) / float(dim);
    const Lanes r = set1(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, mul(mul(load(x + i), r), load(w + i)));
    if (whole < dim) {
      const int n = int(dim - whole);
      store_first(out + whole, mul(mul(load_first(x + whole, n), r), load_first(w + whole, n)), n);
    }
  }
}

void add_values(const float* a, const float* b, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, add(load(a + i), load(b + i)));
  if (i < n) {
    const int left = int(n - i);
    store_first(out + i, add(load_first(a + i, left), load_first(b + i, left)), left);
  }
}

void clamp_values(const float* x, float limit, float* out, int64_t n) {
  const Lanes low = set1(-limit), high = set1(limit);
  int64_t i = 0;
  // The bound is the first operand: a NaN in x fails the comparison and stays NaN.
  for (; i + kLanes <= n; i += kLanes) store(out + i, min(high, max(low, load(x + i))));
  if (i < n) {
    const int left = int(n - i);
    store_first(out + i, min(high, max(low, load_first(x + i, left))), left);
  }
}

SHOAL_INLINE void rope_pair(float* a, float* b, const float* cos, const float* sin, int n) {
  const Lanes va = load_first(a, n), vb = load_first(b, n);
  const Lanes c = load_first(cos, n), s = load_first(sin, n);
  store_first(a, sub(mul(va, c), mul(vb, s)), n);
  store_first(b, add(mul(vb, c), mul(va, s)), n);
}

void rope_rows(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads,
               int64_t dim, int64_t half) {
  for (int64_t t = 0; t < rows; ++t, cos += half, sin += half)
    for (int64_t h = 0; h < heads; ++h, x += dim)
      for (int64_t i = 0; i < half; i += kLanes)
        rope_pair(x + i, x + half + i, cos + i, sin + i, lanes_left(half, i));
}

void softmax_row(const float* logits, float* probabilities, int64_t n) {
  Lanes highest = set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = lanes_left(n, i);
    const Lanes l = keep_range(load_first(logits + i, left), 0, left, -__builtin_inff());
    highest = max(l, highest);
  }
  const Lanes top = set1(fold_max(highest));
  Lanes sums = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = lanes_left(n, i);
    const Lanes e = keep_range(exp(sub(load_first(logits + i, left), top)), 0, left, 0.0f);
    store_first(probabilities + i, e, left);
    sums = add(sums, e);
  }
  const Lanes sum = set1(fold_sum(sums));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = lanes_left(n, i);
    store_first(probabilities + i, div(load_first(probabilities + i, left), sum), left);
  }
}

constexpr FloatsTable kFloatsTable = {rms_norm_rows, add_values, clamp_values, rope_rows,
                                      softmax_row};

}  // namespace
}  // namespace shoal
