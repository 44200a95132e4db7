// Python's door to the frames of calls and replies: arrays and buffers are checked here, what is in
// a stranger's bytes by the codec.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bindings.h"
#include "wire_call.h"
#include "wire_reply.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using RowValues = nb::ndarray<nb::numpy, nb::ndim<2>, nb::ro, nb::c_contig, nb::device::cpu>;

// Below, handing the GIL to another thread costs more than it could do meanwhile.
constexpr size_t kLargeSums = 16384;

void require(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}

// The bytes of any contiguous buffer, held as long as this lives.
class Buffer {
 public:
  explicit Buffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  ByteSpan bytes() const { return {static_cast<const uint8_t*>(view_.buf), size_t(view_.len)}; }

 private:
  Py_buffer view_;
};

nb::bytes new_bytes(size_t size) {
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(size));
  if (bytes == nullptr) throw nb::python_error();
  return nb::steal<nb::bytes>(bytes);
}

uint8_t* data_of(const nb::bytes& bytes) {  // of new ones: nobody else has seen them
  return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(bytes.ptr()));
}

void check_wire_order() {
  require(kIsWireOrder, "frames: this machine's byte order is not the wire's");
}

nb::bytes bind_call_frame(uint64_t call_id, uint32_t layer, uint32_t deadline_ms, uint32_t scheme,
                          uint32_t dim, uint32_t reply_format, const RowValues& values,
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

// What Python needs to see a call's arrays: the head, then `numbers`, which holds row_offsets
// [T + 1] and experts [P] as int32, weights [P] and scales as float32, one after the other; then
// where the values begin: in the frame if they are aligned there (copied is false), else in
// `numbers`, behind the rest.

nb::object bind_read_call(nb::handle frame) {
  check_wire_order();
  const Buffer buffer(frame);
  CallFound found;
  if (!find_call(buffer.bytes(), found)) return nb::none();
  const size_t rows = found.head.num_rows, pairs = found.num_pairs;
  const bool is_copied = reinterpret_cast<uintptr_t>(found.values.data) % 4 != 0;
  const size_t fixed = 4 * (rows + 1 + 2 * pairs) + found.scales.size;
  nb::bytes numbers = new_bytes(fixed + (is_copied ? found.values.size : 0));
  auto* offsets = reinterpret_cast<int32_t*>(data_of(numbers));
  offsets[0] = 0;
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* count = found.pairs_per_row.data + 2 * row;
    offsets[row + 1] = offsets[row] + int32_t(count[0] | count[1] << 8);
  }
  int32_t* experts = offsets + rows + 1;
  for (size_t i = 0; i < pairs; ++i)
    experts[i] = found.experts.data[2 * i] | found.experts.data[2 * i + 1] << 8;
  auto* rest = reinterpret_cast<uint8_t*>(experts + pairs);
  std::memcpy(rest, found.weights.data, found.weights.size);
  if (found.scales.size)
    std::memcpy(rest + found.weights.size, found.scales.data, found.scales.size);
  if (is_copied) std::memcpy(data_of(numbers) + fixed, found.values.data, found.values.size);
  const CallHead& head = found.head;
  return nb::make_tuple(head.call_id, head.deadline_ms, head.layer, head.scheme, head.num_rows,
                        head.dim, pairs, head.reply_format, numbers, is_copied,
                        is_copied ? fixed : size_t(found.values.data - buffer.bytes().data));
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
  const bool is_large = sums.size() > kLargeSums;
  if (is_large) released.emplace();
  const ReplyFrame frame(head, sums.data());
  released.reset();
  nb::bytes out = new_bytes(frame.size());
  if (is_large) released.emplace();
  frame.write(data_of(out));
  released.reset();
  return out;
}

// A reply in the frame that it came in, which is neither copied nor may change meanwhile.
class ReplyView {
 public:
  explicit ReplyView(nb::handle frame) : buffer_(frame) {}
  bool find() { return find_reply(buffer_.bytes(), found_); }
  const ReplyFound& found() const { return found_; }

 private:
  Buffer buffer_;
  ReplyFound found_;
};

nb::object bind_read_reply(nb::handle frame) {
  check_wire_order();
  auto view = std::make_unique<ReplyView>(frame);
  if (!view->find()) return nb::none();
  return nb::cast(view.release(), nb::rv_policy::take_ownership);
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

}  // namespace

void bind_wire(nb::module_& m) {
  m.def("call_frame", bind_call_frame, "call_id"_a, "layer"_a, "deadline_ms"_a, "scheme"_a, "dim"_a,
        "reply_format"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
        "row_offsets"_a.noconvert(), "experts"_a.noconvert(), "weights"_a.noconvert(),
        "The bytes of the ClientFrame of a call.");
  m.def("read_call", bind_read_call, "frame"_a,
        nb::sig("def read_call(frame: bytes | memoryview) -> tuple[int, int, int, int, int, int, "
                "int, int, bytes, bool, int] | None"),
        "(call_id, deadline_ms, layer, scheme, T, dim, P, reply_format, numbers, is_copied, "
        "values_at) of a ClientFrame with a call that is legal, else None.");
  m.def("reply_frame", bind_reply_frame, "call_id"_a, "sums"_a.noconvert(), "grid"_a, "is_bf16"_a,
        "queue_us"_a, "compute_us"_a, "load_us"_a, "The bytes of the NodeFrame of a reply.");
  nb::class_<ReplyView>(m, "ReplyView", "A reply in the frame that it came in.")
      .def_prop_ro("call_id", [](const ReplyView& r) { return r.found().head.call_id; })
      .def_prop_ro("num_rows", [](const ReplyView& r) { return r.found().head.num_rows; })
      .def_prop_ro("dim", [](const ReplyView& r) { return r.found().head.dim; })
      .def_prop_ro("grid", [](const ReplyView& r) { return r.found().head.grid; })
      .def_prop_ro(
          "widths", [](const ReplyView& r) { return copy_of(r.found().widths); }, "A copy.")
      .def_prop_ro(
          "sums", [](const ReplyView& r) { return copy_of(r.found().sums); }, "A copy.")
      .def_prop_ro("queue_us", [](const ReplyView& r) { return r.found().head.queue_us; })
      .def_prop_ro("compute_us", [](const ReplyView& r) { return r.found().head.compute_us; })
      .def_prop_ro("load_us", [](const ReplyView& r) { return r.found().head.load_us; })
      .def_prop_ro("format", [](const ReplyView& r) { return r.found().head.format; });
  m.def("read_reply", bind_read_reply, "frame"_a,
        nb::sig("def read_reply(frame: bytes | memoryview) -> ReplyView | None"),
        "The reply of a NodeFrame, or None: it is something else, or in an unusual form.");
  m.def("add_reply", bind_add_reply, "reply"_a, "rows"_a.noconvert(), "grid"_a,
        "into"_a.noconvert(), "takes_bf16"_a,
        "Add a reply's rows to rows of `into`; False: it is no answer, and nothing was added.");
}

}  // namespace shoal
