// Python's door to fan-outs of one row on sockets.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "wire_fanout.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using RowValues = nb::ndarray<nb::numpy, nb::ndim<2>, nb::ro, nb::c_contig, nb::device::cpu>;
using Buffer = Array<uint8_t, 1>;

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

// (fd, HTTP/2 stream, call id, first pair, end of pairs)
using Target = std::tuple<int, uint32_t, uint64_t, int, int>;

nb::list bind_send_row(const std::vector<Target>& targets, uint32_t layer, uint32_t deadline_ms,
                       uint32_t scheme, uint32_t dim, uint32_t reply_format,
                       const RowValues& values, const Array<const float, 2>& scales,
                       const Array<const int32_t, 1>& experts,
                       const Array<const float, 1>& weights) {
  require(kIsWireOrder, "send_row: this machine's byte order is not the wire's");
  require(scheme >= kWireF32 && scheme <= kWireInt8_256, "send_row: no such scheme");
  const bool is_float = scheme == kWireF32;
  require(values.dtype() == (is_float ? nb::dtype<float>() : nb::dtype<int8_t>()),
          "send_row: values must be float32 or int8, as the scheme says");
  require(values.shape(0) == 1 && scales.shape(0) == 1, "send_row: more than one row");
  require(experts.shape(0) == weights.shape(0), "send_row: experts and weights differ in number");
  for (const auto& [fd, stream_id, call_id, begin, end] : targets)
    require(begin >= 0 && begin < end && size_t(end) <= experts.shape(0),
            "send_row: pairs beyond the row's");
  std::vector<Sent> sent;
  std::vector<size_t> sizes;
  {
    nb::gil_scoped_release release;
    std::vector<uint8_t> frame;
    for (const auto& [fd, stream_id, call_id, begin, end] : targets) {
      const int32_t offsets[2] = {0, end - begin};
      const CallArrays call{
          {call_id, layer, deadline_ms, scheme, 1, dim, reply_format},
          {static_cast<const uint8_t*>(values.data()), values.size() * (is_float ? 4 : 1)},
          {reinterpret_cast<const uint8_t*>(scales.data()), scales.size() * 4},
          offsets,
          experts.data() + begin,
          weights.data() + begin};
      frame.resize(data_frame_size(call));
      write_data_frame(call, stream_id, frame.data());
      sizes.push_back(call_frame_size(call));
      sent.push_back(send_all(fd, frame.data(), frame.size()));
    }
  }
  nb::list result;
  for (size_t i = 0; i < sent.size(); ++i) {
    const std::string& rest = sent[i].rest;
    result.append(nb::make_tuple(sizes[i], sent[i].error, nb::bytes(rest.data(), rest.size())));
  }
  return result;
}

void bind_collect(const std::vector<std::pair<int, uint32_t>>& lanes,
                  const std::vector<int>& others,
                  const std::vector<std::pair<uint64_t, int>>& calls, int grid, bool takes_bf16,
                  const Array<int64_t, 2>& sums, const Buffer& buffer, double patience_s,
                  nb::list news) {
  require(!lanes.empty() && sums.shape(0) == 1, "collect: no lanes, or more than one row");
  require(!takes_bf16 || (grid >= -64 && grid <= 96), "bf16: the grid must be in -64..96");
  std::vector<Awaited> awaited;
  for (const auto& [fd, stream_id] : lanes) awaited.push_back({fd, stream_id});
  std::vector<OpenCall> open;
  for (const auto& [call_id, lane] : calls) open.push_back({call_id, lane});
  const RowSums into{grid, takes_bf16, sums.data(), int64_t(sums.shape(1))};
  const size_t room = buffer.size() / lanes.size();
  require(room >= 64, "collect: too small a buffer");
  std::vector<Collected> collected;
  CollectEnd end;
  {
    nb::gil_scoped_release release;
    end = collect(awaited, others, open, into, buffer.data(), room, patience_s, collected);
  }
  nb::list replies, unread;
  for (const Collected& c : collected)
    replies.append(nb::make_tuple(c.call_id, c.lane, c.after_s, c.queue_us, c.compute_us, c.load_us,
                                  c.frame_size));
  for (size_t lane = 0; lane < end.unread.size(); ++lane) {
    const auto [first, last] = end.unread[lane];
    if (first != last) unread.append(nb::make_tuple(lane, lane * room + first, lane * room + last));
  }
  news.append(nb::make_tuple(int(end.stop), end.lane, end.error, replies, unread));
}

}  // namespace

void bind_fanout(nb::module_& m) {
  m.def("split_row", bind_split_row, "experts"_a.noconvert(), "weights"_a.noconvert(),
        "owners"_a.noconvert(), "grouped"_a.noconvert(), "grouped_weights"_a.noconvert(),
        "Group a row's experts by owner; return (owner, begin, end) of each group.");
  m.def("send_row", bind_send_row, "targets"_a, "layer"_a, "deadline_ms"_a, "scheme"_a, "dim"_a,
        "reply_format"_a, "values"_a.noconvert(), "scales"_a.noconvert(), "experts"_a.noconvert(),
        "weights"_a.noconvert(),
        nb::sig("def send_row(targets: collections.abc.Sequence[tuple[int, int, int, int, int]], "
                "layer: int, deadline_ms: int, scheme: int, dim: int, reply_format: int, "
                "values: numpy.ndarray, scales: numpy.ndarray, experts: numpy.ndarray, "
                "weights: numpy.ndarray) -> list[tuple[int, int, bytes]]"),
        "Send a call to each (fd, stream, call id, first pair, end of pairs); return (bytes of the "
        "ClientFrame, errno, bytes that the socket did not take) of each.");
  m.def("collect_row", bind_collect, "lanes"_a, "others"_a, "calls"_a, "grid"_a, "takes_bf16"_a,
        "sums"_a.noconvert(), "buffer"_a.noconvert(), "patience_s"_a, "news"_a,
        nb::sig("def collect_row(lanes: collections.abc.Sequence[tuple[int, int]], "
                "others: collections.abc.Sequence[int], "
                "calls: collections.abc.Sequence[tuple[int, int]], grid: int, takes_bf16: bool, "
                "sums: numpy.ndarray, buffer: numpy.ndarray, "
                "patience_s: float, news: list[tuple[int, int, int, list[tuple[int, int, float, "
                "int, int, int, int]], list[tuple[int, int, int]]]]) -> None"),
        "Add the replies to these (call id, lane) to `sums` as they come. Appended to `news`, so "
        "that no "
        "signal comes between: why it stopped, lane, errno, (call id, lane, seconds, queue_us, "
        "compute_us, load_us, bytes) of each reply, (lane, begin, end) of what lies unread in the "
        "buffer.");
}

}  // namespace shoal
