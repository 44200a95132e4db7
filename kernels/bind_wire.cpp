// Python's door to the frames of calls and replies: arrays and buffers are checked here, what is in
// a stranger's bytes by the codec.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bind_arrays.h"
#include "bind_frames.h"
#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

void check_wire_order() {
  require(kIsWireOrder, "frames: this machine's byte order is not the wire's");
}

nb::bytes bind_call_frame(uint64_t call_id, uint32_t layer, uint32_t deadline_ms, uint32_t scheme,
                          uint32_t dim, uint32_t reply_format, const ActivationArray& values,
                          const Array<const float, 2>& scales,
                          const Array<const int32_t, 1>& row_offsets,
                          const Array<const int32_t, 1>& experts,
                          const Array<const float, 1>& weights) {
  check_wire_order();
  require(scheme >= kWireF32 && scheme <= kWireInt8_256, "call_frame: no such scheme");
  const bool is_float = scheme == kWireF32;
  require(values.dtype() == (is_float ? nb::dtype<float>() : nb::dtype<int8_t>()),
          "call_frame: values must be float32 or int8, as the scheme says");
  const size_t rows = values.shape(0);
  require(rows >= 1 && rows <= UINT32_MAX && scales.shape(0) == rows &&
              row_offsets.shape(0) == rows + 1,
          "call_frame: scales and row_offsets must have a row for each row of values");
  const int32_t* offsets = row_offsets.data();
  require(offsets[0] == 0 && std::is_sorted(offsets, offsets + rows + 1) &&
              size_t(offsets[rows]) == experts.shape(0) && experts.shape(0) == weights.shape(0),
          "call_frame: row_offsets must ascend from 0 to the number of experts and weights");
  const CallArrays call{
      {call_id, layer, deadline_ms, scheme, uint32_t(rows), dim, reply_format},
      {static_cast<const uint8_t*>(values.data()), values.size() * (is_float ? 4 : 1)},
      {reinterpret_cast<const uint8_t*>(scales.data()), scales.size() * 4},
      offsets,
      experts.data(),
      weights.data()};
  nb::bytes frame = new_bytes(call_frame_size(call));
  write_call_frame(call, data_of(frame));
  return frame;
}

template <class View>
nb::object bind_view(nb::handle frame) {
  check_wire_order();
  auto view = std::make_unique<View>(frame);
  if (!view->is_found()) return nb::none();
  return nb::cast(view.release(), nb::rv_policy::take_ownership);
}

// Memory with a call's arrays in it (put_numbers), and where in it the values are; None: they are
// in the frame, at that place.
nb::tuple bind_numbers(const CallView& view) {
  const CallFound& call = view.found();
  nb::bytes numbers = new_bytes(numbers_size(call));
  const uint8_t* values = put_numbers(call, data_of(numbers));
  const bool is_copied = values != call.values.data;
  const uint8_t* start = is_copied ? data_of(numbers) : view.frame().data;
  return nb::make_tuple(numbers, is_copied, size_t(values - start));
}

nb::bytes bind_reply_frame(uint64_t call_id, const Array<const int64_t, 2>& sums, int grid,
                           bool is_bf16, uint32_t queue_us, uint32_t compute_us, uint32_t load_us) {
  check_wire_order();
  require(!is_bf16 || (grid >= -64 && grid <= 96), "bf16: the grid must be in -64..96");
  require(sums.size() > 0 && sums.shape(0) <= UINT32_MAX && sums.shape(1) <= UINT32_MAX,
          "reply_frame: no sums");
  const ReplyHead head{call_id,
                       uint32_t(sums.shape(0)),
                       uint32_t(sums.shape(1)),
                       grid,
                       queue_us,
                       compute_us,
                       load_us,
                       is_bf16 ? kReplyBf16 : kReplyExact};
  std::optional<nb::gil_scoped_release> released;
  if (sums.size() > kLargeSums) released.emplace();
  const ReplyFrame frame(head, sums.data());
  released.reset();
  return written(frame, sums.size());
}

bool bind_add_reply(const ReplyView& reply, const Array<const int32_t, 1>& rows, int grid,
                    const Array<int64_t, 2>& into, bool takes_bf16) {
  require(!takes_bf16 || (grid >= -64 && grid <= 96), "bf16: the grid must be in -64..96");
  std::optional<nb::gil_scoped_release> released;
  if (rows.size() * into.shape(1) > kLargeSums) released.emplace();
  return add_reply(reply.found(), grid, takes_bf16, rows.data(), int64_t(rows.size()), into.data(),
                   int64_t(into.shape(0)), int64_t(into.shape(1)));
}

nb::bytes copy_of(const ByteSpan& span) { return nb::bytes(span.data, span.size); }

void bind_call_view(nb::module_& m) {
  const auto head = [](const CallView& view) -> const CallHead& { return view.found().head; };
  nb::class_<CallView>(m, "CallView", "A legal call in the frame that it came in.")
      .def_prop_ro("call_id", [=](const CallView& view) { return head(view).call_id; })
      .def_prop_ro("layer", [=](const CallView& view) { return head(view).layer; })
      .def_prop_ro("deadline_ms", [=](const CallView& view) { return head(view).deadline_ms; })
      .def_prop_ro("scheme", [=](const CallView& view) { return head(view).scheme; })
      .def_prop_ro("num_rows", [=](const CallView& view) { return head(view).num_rows; })
      .def_prop_ro("dim", [=](const CallView& view) { return head(view).dim; })
      .def_prop_ro("num_pairs", [](const CallView& view) { return view.found().num_pairs; })
      .def_prop_ro("reply_format", [=](const CallView& view) { return head(view).reply_format; })
      .def("numbers", bind_numbers, nb::sig("def numbers(self) -> tuple[bytes, bool, int]"),
           "Memory with row_offsets [T + 1], experts [P] as int32, weights [P] and scales as "
           "float32, one after the other; whether the values are in it, too, as they are not "
           "aligned in the frame; and where they are.");
}

void bind_reply_view(nb::module_& m) {
  const auto head = [](const ReplyView& view) -> const ReplyHead& { return view.found().head; };
  nb::class_<ReplyView>(m, "ReplyView", "A reply in the frame that it came in.")
      .def_prop_ro("call_id", [=](const ReplyView& view) { return head(view).call_id; })
      .def_prop_ro("num_rows", [=](const ReplyView& view) { return head(view).num_rows; })
      .def_prop_ro("dim", [=](const ReplyView& view) { return head(view).dim; })
      .def_prop_ro("grid", [=](const ReplyView& view) { return head(view).grid; })
      .def_prop_ro(
          "widths", [](const ReplyView& view) { return copy_of(view.found().widths); }, "A copy.")
      .def_prop_ro(
          "sums", [](const ReplyView& view) { return copy_of(view.found().sums); }, "A copy.")
      .def_prop_ro("queue_us", [=](const ReplyView& view) { return head(view).queue_us; })
      .def_prop_ro("compute_us", [=](const ReplyView& view) { return head(view).compute_us; })
      .def_prop_ro("load_us", [=](const ReplyView& view) { return head(view).load_us; })
      .def_prop_ro("format", [=](const ReplyView& view) { return head(view).format; });
}

}  // namespace

void bind_wire(nb::module_& m) {
  bind_call_view(m);
  bind_reply_view(m);
  m.def("call_frame", bind_call_frame, "call_id"_a, "layer"_a, "deadline_ms"_a, "scheme"_a, "dim"_a,
        "reply_format"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
        "row_offsets"_a.noconvert(), "experts"_a.noconvert(), "weights"_a.noconvert(),
        "The bytes of the ClientFrame of a call.");
  m.def("reply_frame", bind_reply_frame, "call_id"_a, "sums"_a.noconvert(), "grid"_a, "is_bf16"_a,
        "queue_us"_a, "compute_us"_a, "load_us"_a, "The bytes of the NodeFrame of a reply.");
  m.def("read_call", bind_view<CallView>, "frame"_a,
        nb::sig("def read_call(frame: bytes | memoryview) -> CallView | None"),
        "The call of a ClientFrame if it is legal, or None.");
  m.def("read_reply", bind_view<ReplyView>, "frame"_a,
        nb::sig("def read_reply(frame: bytes | memoryview) -> ReplyView | None"),
        "The reply of a NodeFrame, or None: it is something else, or in an unusual form.");
  m.def("add_reply", bind_add_reply, "reply"_a, "rows"_a.noconvert(), "grid"_a,
        "into"_a.noconvert(), "takes_bf16"_a,
        "Add a reply's rows to rows of `into`; False: it is no answer, and nothing was added.");
}

}  // namespace shoal
