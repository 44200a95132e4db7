// Python's door to expert_table.h and call_answer.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>
#include <vector>

#include "bind_arrays.h"
#include "bind_expert_table.h"
#include "bind_frames.h"
#include "bindings.h"
#include "call_answer.h"
#include "expert_table.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

std::vector<const uint8_t*> pointers(const ExpertShape& shape, const std::vector<int>& numbers,
                                     const std::vector<ConstBytes>& weights) {
  require_equal("weights", int64_t(numbers.size()), int64_t(weights.size()));
  std::vector<const uint8_t*> experts;
  for (size_t i = 0; i < numbers.size(); ++i) {
    require_below("expert below", 1 << 16, numbers[i]);
    if (experts.size() <= size_t(numbers[i])) experts.resize(size_t(numbers[i]) + 1, nullptr);
    experts[size_t(numbers[i])] = expert_data(shape, weights[i]);
  }
  return experts;
}

// Of any shape: a call has a list of pairs, a routing plan a row of them for each of its rows.
template <class T>
using PairArray = nb::ndarray<const T, nb::numpy, nb::c_contig, nb::device::cpu>;

// As many pairs for each row.
std::vector<int32_t> even_offsets(int num_rows, size_t num_pairs) {
  require(num_rows > 0 && num_pairs % size_t(num_rows) == 0, "experts: not as many for each row");
  std::vector<int32_t> offsets(size_t(num_rows) + 1);
  for (size_t row = 0; row < offsets.size(); ++row)
    offsets[row] = int32_t(row * (num_pairs / size_t(num_rows)));
  return offsets;
}

void require_offsets(const Indices& offsets, int num_rows, size_t num_pairs) {
  require_equal("length of row_offsets", int64_t(num_rows) + 1, int64_t(offsets.size()));
  require_equal("first of row_offsets", 0, offsets.data()[0]);
  require_equal("last of row_offsets", int64_t(num_pairs), offsets.data()[num_rows]);
  for (int row = 0; row < num_rows; ++row)
    require(offsets.data()[row] <= offsets.data()[row + 1], "row_offsets must ascend");
}

void make_table(BoundTable* self, int dim, int ffn_dim, int gate_up, int down,
                const std::vector<int>& numbers, std::vector<ConstBytes> weights) {
  const ExpertShape shape = shape_from(dim, ffn_dim, gate_up, down);
  std::vector<const uint8_t*> experts = pointers(shape, numbers, weights);
  new (self) BoundTable(shape, std::move(experts), std::move(weights));
}

std::optional<BadRows> sums(BoundTable& self, int scheme, int dim, const ActivationArray& values,
                            const ConstFloats& scales, const std::optional<Indices>& row_offsets,
                            const PairArray<int32_t>& experts, const PairArray<float>& weights,
                            int grid, const Array<int64_t, 2>& out) {
  const ExpertShape& shape = self.table().shape();
  if (dim != shape.dim || scheme != int(scheme_of(shape.gate_up))) return std::nullopt;
  const RowsView rows = view_rows(scheme, dim, values, scales);
  std::vector<int32_t> even;
  if (row_offsets)
    require_offsets(*row_offsets, rows.num_rows, experts.size());
  else
    even = even_offsets(rows.num_rows, experts.size());
  const RoutedRows call{rows, row_offsets ? row_offsets->data() : even.data(), experts.data(),
                        weights.data(), grid};
  require_equal("length of weights", int64_t(experts.size()), int64_t(weights.size()));
  require(grid >= -100 && grid <= 100, "grid must be in -100..100");
  require_equal("rows of out", call.rows.num_rows, int64_t(out.shape(0)));
  require_equal("columns of out", dim, int64_t(out.shape(1)));
  if (!self.table().enter()) return std::nullopt;
  const BoundTable::Stay stay{self};
  std::vector<uint8_t> bad(static_cast<size_t>(call.rows.num_rows));
  nb::gil_scoped_release released;
  if (!self.table().sums(call, out.data(), bad.data())) return std::nullopt;
  return indices_of(bad);
}

// The whole way of a call in its frame: bytes of its reply; the rows out of range; or None: it is
// not for this table, or walks over more weights than that.
nb::object answer(BoundTable& self, const CallView& view, int grid, int64_t max_weight_bytes,
                  uint32_t queue_us) {
  const CallFound& call = view.found();
  if (!is_for_table(self.table().shape(), call, max_weight_bytes)) return nb::none();
  require(grid >= -64 && grid <= 96, "grid must be in -64..96");
  if (!self.table().enter()) return nb::none();
  const BoundTable::Stay stay{self};
  CallAnswer answer;
  Outcome outcome;
  {
    nb::gil_scoped_release released;
    outcome = answer.compute(self.table(), call, grid, queue_us);
  }
  if (outcome == Outcome::kNotHere) return nb::none();
  if (outcome == Outcome::kBadRows) return nb::cast(indices_of(answer.bad_rows()));
  return written(answer.reply(), size_t(call.head.num_rows) * call.head.dim);
}

}  // namespace

void bind_experts(nb::module_& m) {
  nb::class_<BoundTable>(m, "ExpertTable", "The owned experts of a layer, all in memory.")
      .def("__init__", make_table, "dim"_a, "ffn_dim"_a, "gate_up"_a, "down"_a, "numbers"_a,
           "weights"_a)
      .def("sums", sums, "scheme"_a, "dim"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
           "row_offsets"_a.noconvert().none(), "experts"_a.noconvert(), "weights"_a.noconvert(),
           "grid"_a, "out"_a.noconvert(),
           "Write weighted integer outputs, added up; return the rows out of range. None, and "
           "nothing is written: it was withdrawn, or the call is not for it.")
      .def("answer", answer, "call"_a, "grid"_a, "max_weight_bytes"_a, "queue_us"_a,
           nb::sig("def answer(self, call: CallView, grid: int, max_weight_bytes: int, "
                   "queue_us: int) -> bytes | list[int] | None"),
           "The frame of a call's reply; or the rows out of range; or None, as `sums`, or the call "
           "walks over more weights.")
      .def("withdraw", &BoundTable::withdraw, "on_idle"_a,
           "Compute no more calls. True: none is under way; else the last one calls on_idle.")
      .def_prop_ro("num_hits", &BoundTable::num_hits,
                   "Experts that calls visited, each once a call.");
}

}  // namespace shoal
