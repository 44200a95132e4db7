// A run's fan-outs, one after the other: see the header.
#include "layer_wires.h"

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

namespace shoal {

bool WiredExperts::sums(int layer, const RoutedRows& asked, int64_t* sums, uint8_t*) {
  rest_threads();  // nodes of this machine need their cores
  const WiredLayer& at = layers_[size_t(layer)];
  const RowsView& rows = asked.rows;
  const bool is_float = rows.scheme == Scheme::f32;
  const int64_t span = span_of(rows.scheme), padded = is_float ? 0 : round_up(rows.dim, span);
  const ByteSpan values =
      is_float ? ByteSpan{reinterpret_cast<const uint8_t*>(rows.floats), size_t(rows.dim) * 4}
               : ByteSpan{reinterpret_cast<const uint8_t*>(rows.quants), size_t(padded)};
  const ByteSpan scales{reinterpret_cast<const uint8_t*>(rows.scales),
                        is_float ? 0 : size_t(padded / span) * 4};
  const int32_t num_pairs = asked.row_offsets[1];
  RowCall row{call_.head, values, scales, asked.experts, asked.weights, num_pairs, at.owners};
  row.head.call_id += uint64_t(layer) * uint64_t(call_.num_ids);
  row.head.layer = at.layer;
  row.head.scheme = uint32_t(rows.scheme) + 1;  // Scheme of expert.proto
  std::fill_n(sums, rows.dim, int64_t(0));
  reports_.push_back({elapsed_s(), {}, {}, {}});
  LayerReport& report = reports_.back();
  const RowSums into{asked.grid, call_.takes_bf16, sums, rows.dim};
  report.end = wires_.run(row, into, call_.patience_s, report.sent, report.collected);
  if (report.end.stop == Collecting::kDone && report.end.unread.empty()) return true;
  std::memcpy(left_.values, values.data, values.size);
  if (scales.size != 0) std::memcpy(left_.scales, scales.data, scales.size);
  std::memcpy(left_.weights, asked.weights, size_t(num_pairs) * 4);
  return false;
}

}  // namespace shoal
