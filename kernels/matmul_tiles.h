// What the matmul_<isa>.cpp files share, written on Lanes.
//
// Such a file includes its lanes_*.h, defines
//     kFloatAccumulators, kIntTile, kQ4KTile       how many Lanes its registers hold, tile sizes
//     kRowsInRegisters       largest integer tile whose sums stay in registers
//     int groups_at_once(int rows)                 how many row groups such a tile meets together,
//                                                  Q4_K's apart
//     int fetched_ahead(int rows, int bits)        how many bytes in advance such a tile asks for
//                                                  weights of so many bits; 0: not at all
//     template <int N> void add_block(Q4_0, records, b, x, x_scale, x_start, Lanes* acc)
//         for Q4_1, Q8_0, Q4_T and Q3_T as well: acc[g * N + t] += block b of group g's record
//         times that block of row t, t < N; records are Records<groups_at_once(N)> and Records<1>,
//         which is a const uint8_t*
//     template <int N> void add_super_block(record, x, x_scale, x_sums, Lanes* acc)    for Q4_K
//     bool add_quanta(int64_t* sums, const Lanes& y, float weight, double two_to_grid)
// in an anonymous namespace, then includes this file, which builds its MatrixKernels from them.
#pragma once
#include "matmul.h"
#include "matmul_entries.h"

namespace shoal {
namespace {

// --- F32, F16, BF16: acc = fma(w, x, acc), k ascending -----------------------------------------

template <Format F>
SHOAL_INLINE Lanes load_weights(const uint8_t* p) {
  if (F == Format::f32) return load(reinterpret_cast<const float*>(p));
  if (F == Format::f16) return load_half(reinterpret_cast<const uint16_t*>(p));
  return load_bf16(reinterpret_cast<const uint16_t*>(p));
}

// G row groups at once: one chain of fma per group and row hides the latency of the others.
template <Format F, int N, int G>
SHOAL_INLINE void float_groups(const uint8_t* group, int64_t stride, int cols, const Tile& tile,
                               Lanes* acc) {
  constexpr int step = F == Format::f32 ? 64 : 32, ahead = fetched_ahead(N, step / 2);
  Lanes a[G * N];
  for (int i = 0; i < G * N; ++i) a[i] = acc[i];
  const float* x = tile.values;
  for (int k = 0; k < cols; ++k, x += N, group += step) {
    for (int g = 0; g < G; ++g) {
      const uint8_t* at = group + g * stride;
      if (ahead) prefetch_weights(at, 1, ahead);
      const Lanes w = load_weights<F>(at);
      for (int t = 0; t < N; ++t) a[g * N + t] = fma(w, set1(x[t]), a[g * N + t]);
    }
  }
  for (int i = 0; i < G * N; ++i) acc[i] = a[i];
}

template <Format F, int N>
SHOAL_INLINE void float_kernel(const uint8_t* groups, int64_t stride, int count, int cols,
                               const Tile& tile, Lanes* acc) {
  constexpr int fit = kFloatAccumulators / N;
  constexpr int G = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  for (; count >= G; count -= G, groups += G * stride, acc += G * N)
    float_groups<F, N, G>(groups, stride, cols, tile, acc);
  if (G == 4 && count >= 2) {
    float_groups<F, N, 2>(groups, stride, cols, tile, acc);
    count -= 2, groups += 2 * stride, acc += 2 * N;
  }
  if (count == 1) float_groups<F, N, 1>(groups, stride, cols, tile, acc);
}

// --- Integer formats: exact dots, one float step a block ---------------------------------------

// acc[g * N + t] += row group g * row t.  Records hold L::blocks blocks, the last of two maybe one.
template <class L, int N, int G>
SHOAL_INLINE void block_kernel(Records<G> at, int blocks, const Tile& tile, Lanes* sums) {
  constexpr int ahead = fetched_ahead(N, L::block_quants * 8 / (kLanes * kBlock));
  const int8_t* x = tile.quants;
  const float* x_scale = tile.scales;
  const int32_t* x_start = tile.start;
  Lanes kept[G * N], *const acc = G * N <= kRowsInRegisters ? kept : sums;
  for (int i = 0; acc == kept && i < G * N; ++i) acc[i] = sums[i];
  for (; blocks >= L::blocks; blocks -= L::blocks, at.first += L::record) {
    // Behind the end of a group comes what is being read already, but for the last one.
    const int64_t skip = blocks / L::blocks * L::record <= ahead ? (G - 1) * at.stride : 0;
#pragma GCC unroll 2
    for (int b = 0; b < L::blocks; ++b, x += N * kBlock, x_scale += N, x_start += N) {
      // Of two groups one in each block: all their lines at a stroke are more than a core fetches
      // at once (README.md).
      for (int g = b; ahead && g < G; g += L::blocks)
        prefetch_weights(at[g] + skip, L::record, ahead);
      add_block<N>(L{}, at, b, x, x_scale, x_start, acc);
    }
  }
  if (L::blocks == 2 && blocks == 1) add_block<N>(L{}, at, 0, x, x_scale, x_start, acc);
  for (int i = 0; acc == kept && i < G * N; ++i) sums[i] = acc[i];
}

template <int N>
SHOAL_INLINE void super_block_kernel(const uint8_t* record, int blocks, const Tile& tile,
                                     Lanes* sums) {
  Lanes kept[N], *const acc = N <= kRowsInRegisters ? kept : sums;
  for (int t = 0; acc == kept && t < N; ++t) acc[t] = sums[t];
  for (int b = 0; b < blocks; ++b, record += Q4_K::record)
    add_super_block<N>(record, tile.quants + int64_t(b) * N * kSuperBlock, tile.scales + b * N,
                       tile.sums + b * N * 8, acc);
  for (int t = 0; acc == kept && t < N; ++t) sums[t] = acc[t];
}

template <Format F, int N, int G>
SHOAL_INLINE void integer_kernel(Records<G> at, int blocks, const Tile& tile, Lanes* acc) {
  if constexpr (F == Format::q8_0) block_kernel<Q8_0, N>(at, blocks, tile, acc);
  if constexpr (F == Format::q4_0) block_kernel<Q4_0, N>(at, blocks, tile, acc);
  if constexpr (F == Format::q4_1) block_kernel<Q4_1, N>(at, blocks, tile, acc);
  if constexpr (F == Format::q4_t) block_kernel<Q4_T, N>(at, blocks, tile, acc);
  if constexpr (F == Format::q3_t) block_kernel<Q3_T, N>(at, blocks, tile, acc);
  if constexpr (F == Format::q4_k) super_block_kernel<N>(at.first, blocks, tile, acc);
}

// --- One entry a format and tile size ----------------------------------------------------------

// acc[g * N + t] += group g * row t, g < count.
template <Format F, int N>
__attribute__((noinline)) void group_kernel(const uint8_t* groups, int64_t stride, int count,
                                            int cols, const Tile& tile, Lanes* acc) {
  if constexpr (block_cols(F) == 1) {
    float_kernel<F, N>(groups, stride, count, cols, tile, acc);
  } else {
    constexpr int G = F == Format::q4_k ? 1 : groups_at_once(N);
    const int blocks = (cols + block_cols(F) - 1) / block_cols(F);
    for (; G > 1 && count >= G; count -= G, groups += G * stride, acc += G * N)
      integer_kernel<F, N>(Records<G>{groups, stride}, blocks, tile, acc);
    for (; count > 0; --count, groups += stride, acc += N)
      integer_kernel<F, N>(Records<1>{groups, stride}, blocks, tile, acc);
  }
}

constexpr int tile_limit(Format f) {
  return block_cols(f) == 1  ? (kFloatAccumulators < 8 ? 4 : 8)
         : f == Format::q4_k ? kQ4KTile
                             : kIntTile;
}

template <Format F>
GroupKernel sized_kernel(int n) {
  constexpr int limit = tile_limit(F);
  if (n == 1) return group_kernel<F, 1>;
  if (n == 2) return group_kernel<F, 2>;
  if (n == 4) return group_kernel<F, 4>;
  if constexpr (limit >= 8) {
    if (n == 8) return group_kernel<F, 8>;
  }
  if constexpr (limit >= 16) return group_kernel<F, 16>;
  return nullptr;  // the driver makes no such tile
}

GroupKernel kernel_of(Format format, int n) {
  switch (format) {
    case Format::f32:
      return sized_kernel<Format::f32>(n);
    case Format::f16:
      return sized_kernel<Format::f16>(n);
    case Format::bf16:
      return sized_kernel<Format::bf16>(n);
    case Format::q8_0:
      return sized_kernel<Format::q8_0>(n);
    case Format::q4_0:
      return sized_kernel<Format::q4_0>(n);
    case Format::q4_1:
      return sized_kernel<Format::q4_1>(n);
    case Format::q4_k:
      return sized_kernel<Format::q4_k>(n);
    case Format::q4_t:
      return sized_kernel<Format::q4_t>(n);
    case Format::q3_t:
      return sized_kernel<Format::q3_t>(n);
  }
  return nullptr;
}

}  // namespace
}  // namespace shoal

#define SHOAL_MAX_TILES                                                          \
  {tile_limit(Format::f32),  tile_limit(Format::f16),  tile_limit(Format::bf16), \
   tile_limit(Format::q8_0), tile_limit(Format::q4_0), tile_limit(Format::q4_1), \
   tile_limit(Format::q4_k), tile_limit(Format::q4_t), tile_limit(Format::q3_t)}
#define SHOAL_MATRIX_KERNELS {SHOAL_MAX_TILES, matmul_tile, gate_up_tile, down_sums_tile}
