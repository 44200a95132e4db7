// The entries of a MatrixKernels, for a file that has Lanes, add_quanta (matmul_tiles.h) and
//     GroupKernel kernel_of(Format, int n)     the kernel of a tile of n rows
#pragma once
#include "matmul.h"

namespace shoal {
namespace {

// acc[g * n + t] += group g * row t, g < count.
using GroupKernel = void (*)(const uint8_t* groups, int64_t stride, int count, int cols,
                             const Tile& tile, Lanes* acc);
GroupKernel kernel_of(Format format, int n);

constexpr int kGroupsAtOnce = 4;

SHOAL_INLINE int lesser(int a, int b) { return a < b ? a : b; }

// Lanes [first, first + 16) of a bias, and of a row of `lanes` values.
SHOAL_INLINE Lanes start_of(const float* bias, int first, int lanes) {
  if (bias == nullptr) return zero();
  const int valid = lesser(kLanes, lanes - first);
  return valid == kLanes ? load(bias + first) : load_first(bias + first, valid);
}
SHOAL_INLINE void store_lanes(float* out, const Lanes& values, int first, int lanes) {
  const int valid = lesser(kLanes, lanes - first);
  if (valid == kLanes)
    store(out + first, values);
  else
    store_first(out + first, values, valid);
}

void matmul_tile(Format format, const uint8_t* groups, int count, int lanes, int cols,
                 const Tile& tile, int n, const float* bias, float* out, int64_t out_stride) {
  const int64_t stride = group_bytes(format, cols);
  const GroupKernel kernel = kernel_of(format, n);
  Lanes acc[kGroupsAtOnce * kMaxTile];
  for (int done = 0; done < count; done += kGroupsAtOnce) {
    const int now = lesser(kGroupsAtOnce, count - done);
    for (int g = 0; g < now; ++g) {
      const Lanes start = start_of(bias, (done + g) * kLanes, lanes);
      for (int t = 0; t < n; ++t) acc[g * n + t] = start;
    }
    kernel(groups + done * stride, stride, now, cols, tile, acc);
    for (int g = 0; g < now; ++g)
      for (int t = 0; t < n; ++t)
        store_lanes(out + t * out_stride, acc[g * n + t], (done + g) * kLanes, lanes);
  }
}

// up * (gate / (1 + exp(0 - gate)))
SHOAL_INLINE Lanes swiglu(const Lanes& gate, const Lanes& up) {
  return mul(up, div(gate, add(set1(1.0f), exp(sub(zero(), gate)))));
}

void gate_up_tile(Format format, const uint8_t* groups, int count, int cols, const Tile& tile,
                  int n, float* h, int64_t h_stride) {
  const int64_t stride = group_bytes(format, cols);
  const GroupKernel kernel = kernel_of(format, n);
  Lanes acc[2 * kMaxTile];
  for (int pair = 0; pair < count; ++pair, groups += 2 * stride, h += kLanes) {
    for (int i = 0; i < 2 * n; ++i) acc[i] = zero();
    kernel(groups, stride, 2, cols, tile, acc);
    for (int t = 0; t < n; ++t) store(h + t * h_stride, swiglu(acc[t], acc[n + t]));
  }
}

// sums[i] += one row's quanta of a group.  False as MatrixKernels::down_sums marks it.
SHOAL_INLINE bool add_lanes(int64_t* sums, const Lanes& y, int lanes, float weight,
                            double two_to_grid) {
  if (lanes >= kLanes) return add_quanta(sums, y, weight, two_to_grid);
  int64_t all[kLanes] = {0};
  const bool good = add_quanta(all, y, weight, two_to_grid);
  for (int i = 0; good && i < lanes; ++i) sums[i] += all[i];
  return good;
}

uint32_t down_sums_tile(Format format, const uint8_t* groups, int count, int lanes, int cols,
                        const Tile& tile, int n, const float* weights, double two_to_grid,
                        int64_t* const* sums) {
  const int64_t stride = group_bytes(format, cols);
  const GroupKernel kernel = kernel_of(format, n);
  Lanes acc[kGroupsAtOnce * kMaxTile];
  uint32_t bad = 0;
  for (int done = 0; done < count; done += kGroupsAtOnce) {
    const int now = lesser(kGroupsAtOnce, count - done);
    for (int i = 0; i < now * n; ++i) acc[i] = zero();
    // Many rows' sums lie a power of two apart, and have left the caches that they share.
    for (int t = 0; n > 1 && t < n; ++t)
      for (int i = 0; i < now * kLanes; i += 8) __builtin_prefetch(sums[t] + done * kLanes + i, 1);
    kernel(groups + done * stride, stride, now, cols, tile, acc);
    for (int g = 0; g < now; ++g) {
      const int first = (done + g) * kLanes;
      for (int t = 0; t < n; ++t)
        bad |= uint32_t(!add_lanes(sums[t] + first, acc[g * n + t], lanes - first, weights[t],
                                   two_to_grid))
               << t;
    }
  }
  return bad;
}

}  // namespace
}  // namespace shoal
