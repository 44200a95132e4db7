// Frames of calls and replies as Python holds them: views of a buffer that they keep.
#pragma once
#include <nanobind/nanobind.h>

#include <optional>

#include "wire_call.h"
#include "wire_reply.h"

namespace shoal {

// Below, handing the GIL to another thread costs more than it could do meanwhile.
constexpr size_t kLargeSums = 16384;

// The bytes of any contiguous buffer, held as long as this lives.
class Buffer {
 public:
  explicit Buffer(nanobind::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nanobind::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  ByteSpan bytes() const { return {static_cast<const uint8_t*>(view_.buf), size_t(view_.len)}; }

 private:
  Py_buffer view_;
};

// A call or a reply in the frame that it came in, which is neither copied nor may change meanwhile.
template <class Found, bool (*find)(ByteSpan, Found&)>
class FrameView {
 public:
  explicit FrameView(nanobind::handle frame) : buffer_(frame) {
    is_found_ = find(buffer_.bytes(), found_);
  }
  bool is_found() const { return is_found_; }
  const Found& found() const { return found_; }
  ByteSpan frame() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
  Found found_;
  bool is_found_;
};
using CallView = FrameView<CallFound, find_call>;
using ReplyView = FrameView<ReplyFound, find_reply>;

inline nanobind::bytes new_bytes(size_t size) {
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(size));
  if (bytes == nullptr) throw nanobind::python_error();
  return nanobind::steal<nanobind::bytes>(bytes);
}

inline uint8_t* data_of(const nanobind::bytes& bytes) {  // of new ones: nobody else has seen them
  return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(bytes.ptr()));
}

// The bytes of a frame of that many sums.
inline nanobind::bytes written(const ReplyFrame& frame, size_t num_sums) {
  nanobind::bytes out = new_bytes(frame.size());
  std::optional<nanobind::gil_scoped_release> released;
  if (num_sums > kLargeSums) released.emplace();
  frame.write(data_of(out));
  return out;
}

}  // namespace shoal
