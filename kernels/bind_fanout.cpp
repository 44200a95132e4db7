// Python's door to fan-outs of one row on sockets.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind_row_report.h"
#include "bindings.h"
#include "wire_fanout.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using RowValues = nb::ndarray<nb::numpy, nb::ndim<2>, nb::ro, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}

using Part = std::tuple<int, int, int>;

std::vector<Part> bind_split_row(const Array<const int32_t, 2>& experts,
                                 const Array<const float, 2>& weights,
                                 const Array<const int32_t, 1>& owners,
                                 const Array<int32_t, 1>& grouped,
                                 const Array<float, 1>& grouped_weights) {
  const size_t count = experts.shape(1);
  require(experts.shape(0) == 1 && weights.shape(0) == 1 && weights.shape(1) == count &&
              grouped.shape(0) == count && grouped_weights.shape(0) == count,
          "split_row: experts and weights must be [1, K], what they are grouped into [K]");
  for (size_t i = 0; i < count; ++i)
    require(experts.data()[i] >= 0 && size_t(experts.data()[i]) < owners.shape(0),
            "split_row: an expert that has no owner");
  std::vector<Part> parts;
  for (const RowPart& part : split_row(experts.data(), weights.data(), int64_t(count),
                                       owners.data(), grouped.data(), grouped_weights.data()))
    parts.emplace_back(part.slot, part.begin, part.end);
  return parts;
}

RowSums sums_of(const Array<int64_t, 2>& sums, int grid, bool takes_bf16) {
  require(sums.shape(0) == 1, "more than one row of sums");
  require(!takes_bf16 || (grid >= -64 && grid <= 96), "bf16: the grid must be in -64..96");
  return {grid, takes_bf16, sums.data(), int64_t(sums.shape(1))};
}

void bind_run(RowWires& wires, uint64_t first_id, uint32_t layer, uint32_t deadline_ms,
              uint32_t scheme, uint32_t dim, uint32_t reply_format, const RowValues& values,
              const Array<const float, 2>& scales, const Array<const int32_t, 2>& experts,
              const Array<const float, 2>& weights, const Array<const int32_t, 1>& owners, int grid,
              bool takes_bf16, const Array<int64_t, 2>& sums, double patience_s, nb::list out) {
  require(kIsWireOrder, "run: this machine's byte order is not the wire's");
  require(scheme >= kWireF32 && scheme <= kWireInt8_256, "run: no such scheme");
  const bool is_float = scheme == kWireF32;
  require(values.dtype() == (is_float ? nb::dtype<float>() : nb::dtype<int8_t>()),
          "run: values must be float32 or int8, as the scheme says");
  require(values.shape(0) == 1 && scales.shape(0) == 1 && experts.shape(0) == 1 &&
              weights.shape(0) == 1 && weights.shape(1) == experts.shape(1),
          "run: not one row, or experts and weights differ in number");
  for (size_t i = 0; i < experts.shape(1); ++i) {
    const int32_t expert = experts.data()[i];
    require(expert >= 0 && size_t(expert) < owners.shape(0), "run: an expert that has no owner");
    const int32_t slot = owners.data()[expert];
    require(slot >= 0 && slot < wires.num_slots(), "run: an owner that is no slot");
  }
  const RowCall row{
      {first_id, layer, deadline_ms, scheme, 1, dim, reply_format},
      {static_cast<const uint8_t*>(values.data()), values.size() * (is_float ? 4 : 1)},
      {reinterpret_cast<const uint8_t*>(scales.data()), scales.size() * 4},
      experts.data(),
      weights.data(),
      int64_t(experts.shape(1)),
      owners.data()};
  const RowSums into = sums_of(sums, grid, takes_bf16);
  std::vector<SentCall> sent;
  std::vector<Collected> collected;
  CollectEnd end;
  {
    nb::gil_scoped_release release;
    end = wires.run(row, into, patience_s, sent, collected);
  }
  out.append(report_of(sent, end, collected));
}

void bind_collect(RowWires& wires, std::vector<uint64_t> wanted, int grid, bool takes_bf16,
                  const Array<int64_t, 2>& sums, double patience_s, nb::list out) {
  const RowSums into = sums_of(sums, grid, takes_bf16);
  std::vector<Collected> collected;
  CollectEnd end;
  {
    nb::gil_scoped_release release;
    end = wires.collect(wanted, into, patience_s, collected);
  }
  out.append(report_of({}, end, collected));
}

void make_wires(RowWires* made, const std::vector<std::pair<int, uint32_t>>& lanes,
                std::vector<int> lane_of_slot, std::vector<int> others, size_t room) {
  require(!lanes.empty() && room >= 64, "RowWires: no lanes, or too little room");
  for (const int lane : lane_of_slot)
    require(lane >= -1 && lane < int(lanes.size()), "RowWires: a slot of no lane");
  std::vector<RowLane> own;
  for (const auto& [fd, stream_id] : lanes) own.push_back({fd, stream_id});
  new (made) RowWires(std::move(own), std::move(lane_of_slot), std::move(others), room);
}

}  // namespace

void bind_fanout(nb::module_& m) {
  m.def("split_row", bind_split_row, "experts"_a.noconvert(), "weights"_a.noconvert(),
        "owners"_a.noconvert(), "grouped"_a.noconvert(), "grouped_weights"_a.noconvert(),
        "Group a row's experts by owner; return (owner, begin, end) of each group.");
  nb::class_<RowWires>(m, "RowWires", "Sockets that rows are sent on, one row after the other.")
      .def("__init__", make_wires, "lanes"_a, "lane_of_slot"_a, "others"_a, "room"_a,
           "lanes: (fd, HTTP/2 stream). lane_of_slot: -1 for none. others: descriptors whose news "
           "end collecting. room: bytes for a reply that comes in pieces.")
      .def("run", bind_run, "first_id"_a, "layer"_a, "deadline_ms"_a, "scheme"_a, "dim"_a,
           "reply_format"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
           "experts"_a.noconvert(), "weights"_a.noconvert(), "owners"_a.noconvert(), "grid"_a,
           "takes_bf16"_a, "sums"_a.noconvert(), "patience_s"_a, "out"_a,
           nb::sig("def run(self, first_id: int, layer: int, deadline_ms: int, scheme: int, "
                   "dim: int, reply_format: int, values: numpy.ndarray, scales: numpy.ndarray, "
                   "experts: numpy.ndarray, weights: numpy.ndarray, owners: numpy.ndarray, "
                   "grid: int, takes_bf16: bool, sums: numpy.ndarray, patience_s: float, "
                   "out: list) -> None"),
           "Send a call, of ids from `first_id` on, to each slot that owns any of a row's experts, "
           "then `collect` their replies. Appended to `out`: (calls, why it stopped, lane, errno, "
           "replies, unread), where a call is (lane, slot, experts, bytes of the ClientFrame, "
           "errno, "
           "bytes that the socket did not take), in `split_row`'s order; a reply (call id, lane, "
           "seconds, "
           "queue_us, compute_us, load_us, bytes); unread (lane, bytes). No calls: a slot has no "
           "lane, or two have one, and nothing was sent.")
      .def("collect", bind_collect, "wanted"_a, "grid"_a, "takes_bf16"_a, "sums"_a.noconvert(),
           "patience_s"_a, "out"_a,
           nb::sig("def collect(self, wanted: collections.abc.Sequence[int], grid: int, "
                   "takes_bf16: bool, sums: numpy.ndarray, patience_s: float, out: list) "
                   "-> None"),
           "Add the replies to these calls of the last row to `sums` as they come, for so long at "
           "most. Appends to `out` as `run` does, without calls.");
}

}  // namespace shoal
