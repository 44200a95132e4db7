// Python's door to the io_uring reader: what is read into memory is checked to lie inside arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>
#include <tuple>

#include "bindings.h"
#include "store_memory.h"
#include "store_uring.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// id, file, is_registered_file, may_block, is_prefetch, offset, out, start, num_bytes
using ReadArguments = std::tuple<uint64_t, int, bool, bool, bool, int64_t, Bytes, size_t, size_t>;

RingRead ring_read(const ReadArguments& arguments) {
  const auto& [id, file, is_registered, may_block, is_prefetch, offset, out, start, num_bytes] =
      arguments;
  if (id == Ring::kWakeId) throw nb::value_error("id: reserved");
  if (offset < 0) throw nb::value_error("offset: negative");
  if (start > out.size() || num_bytes > out.size() - start || num_bytes > (size_t{1} << 30)) {
    throw nb::value_error("num_bytes: beyond the array, or above 1 GiB");
  }
  return {id,          file,   is_registered,      may_block,
          is_prefetch, offset, out.data() + start, uint32_t(num_bytes)};
}

}  // namespace

void bind_store(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.what());
    }
  });

  m.def("direct_alignment", &direct_alignment, "descriptor"_a,
        "Return (offset, address) alignment of direct reads, or None where it is not told.");
  m.def("set_read_priority", &set_read_priority, "is_prefetch"_a,
        "Give this thread's reads the priority of prefetches or its own; return 0 or an errno.");
  m.def(
      "populate", [](const Bytes& memory) { return populate(memory.data(), memory.size()); },
      "memory"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Have the system back these bytes with pages; return 0 or an errno.");

  using Guard = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Ring>(m, "Ring", "An io_uring that reads. Raises OSError where there is none.")
      .def(nb::init<unsigned>(), "entries"_a)
      .def(
          "submit",
          [](Ring& ring, const std::vector<ReadArguments>& list) {
            std::vector<RingRead> reads;
            reads.reserve(list.size());
            for (const ReadArguments& arguments : list) reads.push_back(ring_read(arguments));
            nb::gil_scoped_release release;
            return ring.submit(reads);
          },
          "reads"_a,
          "Start reads; return how many of the first were taken. Their arrays must live on.")
      .def(
          "wait",
          [](Ring& ring, double timeout_s) {
            std::vector<RingDone> done;
            {
              nb::gil_scoped_release release;
              done = ring.wait(timeout_s);
            }
            std::vector<std::pair<uint64_t, int64_t>> results;
            results.reserve(done.size());
            for (const RingDone& one : done) results.emplace_back(one.id, one.result);
            return results;
          },
          "timeout_s"_a, "Return (id, bytes read or -errno) of what has ended.")
      .def("wake", &Ring::wake, Guard(), "End the wait under way, or the next.")
      .def(
          "entry",
          [](Ring& ring, const ReadArguments& arguments) {
            const std::vector<uint8_t> bytes = ring.entry(ring_read(arguments));
            return nb::bytes(bytes.data(), bytes.size());
          },
          "read"_a, "Return the struct io_uring_sqe that `submit` would make of a read.")
      .def(
          "abandon",
          [](Ring& ring, nb::object memory) {
            memory.release();  // never freed: the kernel may write into it at any time
            ring.abandon();
          },
          "memory"_a, "Wait for no read any more; what holds their arrays is kept for ever.")
      .def(
          "register_memory",
          [](Ring& ring, const std::vector<Bytes>& arrays) {
            std::vector<MemoryPart> parts;
            for (const Bytes& array : arrays) parts.push_back({array.data(), array.size()});
            nb::gil_scoped_release release;
            return ring.register_memory(parts);
          },
          "arrays"_a,
          "Name memory to be pinned as it is used, in place of what was; return 0 or an errno.")
      .def_prop_ro("pinned_bytes", &Ring::pinned_bytes)
      .def_prop_ro("pin_error", &Ring::pin_error, "Why memory could not be pinned: errno, or 0.")
      .def("register_files", &Ring::register_files, "descriptors"_a, Guard(),
           "Make files known in place of those known before; return 0 or an errno.");
}

}  // namespace shoal
