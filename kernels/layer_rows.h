// Rows on their way through a decoder layer: where they stand, what is wrong with some, and their
// forms under each activation scheme.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "layer_arena.h"
#include "matmul.h"

namespace shoal {

// What stops a layer; shoal/ops/layers.py has a sentence for each.
enum class Stop : int { not_finite, beyond_cache, router_logit, ffn_output, expert_output };

// Thrown: these rows, ascending, cannot go on.  Others may have been written to the cache.
struct StoppedRows {
  Stop stop;
  std::vector<int32_t> rows;
};

// The marked ones of bad[rows], if any, are thrown.
void throw_marked(Stop stop, const uint8_t* bad, int64_t rows);

// A row each: cos and sin [rows][half] of its angles, its slot, sequence and position.
struct RowPlaces {
  int64_t rows, half;
  const float *cos, *sin;
  const int32_t *slots, *sequence, *position;
  const int32_t* block_tables;  // [sequences][blocks_per_sequence]
  int64_t sequences, blocks_per_sequence;
};

// Rows index[0, count) of rows of `width` values.
template <class T>
T* gathered(Arena& arena, const T* values, int64_t width, const int64_t* index, int64_t count) {
  T* const taken = arena.take<T>(count * width);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) taken[i * width + j] = values[index[i] * width + j];
  return taken;
}

RowPlaces gathered(Arena& arena, const RowPlaces& places, const int64_t* index, int64_t count);

// x[rows][dim] under every scheme that is asked for, each made once.
class LayerRows {
 public:
  LayerRows(Arena& arena, const float* x, int64_t rows, int64_t dim)
      : arena_(arena), x_(x), rows_(int(rows)), dim_(int(dim)) {}

  int64_t num_rows() const { return rows_; }

  // Throws StoppedRows of those that are not finite.
  const RowsView& under(Scheme scheme);

  // The same into the caller's arrays; both are ignored for Scheme::f32.
  const RowsView& under(Scheme scheme, int8_t* quants, float* scales);

 private:
  Arena& arena_;
  const float* x_;
  int rows_, dim_;
  std::optional<RowsView> views_[3];  // by Scheme
};

}  // namespace shoal
