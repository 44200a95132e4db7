// Rows on their way through a decoder layer.
#include "layer_rows.h"

#include "quantise.h"

namespace shoal {

void throw_marked(Stop stop, const uint8_t* bad, int64_t rows) {
  StoppedRows found{stop, {}};
  for (int64_t t = 0; t < rows; ++t)
    if (bad[t]) found.rows.push_back(int32_t(t));
  if (!found.rows.empty()) throw found;
}

RowPlaces gathered(Arena& arena, const RowPlaces& places, const int64_t* index, int64_t count) {
  RowPlaces taken = places;
  taken.rows = count;
  taken.cos = gathered(arena, places.cos, places.half, index, count);
  taken.sin = gathered(arena, places.sin, places.half, index, count);
  taken.slots = gathered(arena, places.slots, 1, index, count);
  taken.sequence = gathered(arena, places.sequence, 1, index, count);
  taken.position = gathered(arena, places.position, 1, index, count);
  return taken;
}

const RowsView& LayerRows::under(Scheme scheme) {
  if (scheme == Scheme::f32) return under(scheme, nullptr, nullptr);
  const int64_t span = span_of(scheme), padded = round_up(dim_, span);
  if (views_[int(scheme)]) return *views_[int(scheme)];
  int8_t* const quants = arena_.take<int8_t>(rows_ * padded);
  return under(scheme, quants, arena_.take<float>(rows_ * (padded / span)));
}

const RowsView& LayerRows::under(Scheme scheme, int8_t* quants, float* scales) {
  std::optional<RowsView>& view = views_[int(scheme)];
  if (view) return *view;
  uint8_t* const bad = arena_.take<uint8_t>(rows_);
  quantise_rows(scheme, x_, rows_, dim_, quants, scales, bad);
  throw_marked(Stop::not_finite, bad, rows_);
  view = RowsView{scheme, rows_, dim_, scheme == Scheme::f32 ? x_ : nullptr, quants, scales};
  return *view;
}

}  // namespace shoal
