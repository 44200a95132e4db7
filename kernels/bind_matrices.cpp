// Python's door to the matrix kernels: dtypes and layouts are checked here (never converted), sizes
// and ranges too, so that no call can make a kernel read or write outside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_arrays.h"
#include "bind_views.h"
#include "bindings.h"
#include "matmul.h"
#include "pack.h"
#include "quantise.h"
#include "quantise_q4_k.h"
#include "quantise_table.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

using Bytes = Array<uint8_t, 1>;
using ConstByteRows = Array<const uint8_t, 2>;
using Floats = Array<float, 2>;
using Importance = std::optional<Array<const float, 1>>;

// --- Packing -----------------------------------------------------------------------------------

void bind_pack_rows(int format, const ConstByteRows& source, int cols, const Bytes& out) {
  const Format f = format_from(format);
  const int rows = int(source.shape(0));
  require_dims(rows, cols);
  require_equal("bytes of a source row", row_bytes(f, cols), int64_t(source.shape(1)));
  require_equal("bytes of out", num_groups(rows) * group_bytes(f, cols), int64_t(out.size()));
  nb::gil_scoped_release released;
  pack_rows(f, source.data(), rows, cols, group_bytes(f, cols), out.data());
}

void require_source(const char* what, const ConstByteRows& source, Format f, int rows, int cols) {
  require_equal(what, rows, int64_t(source.shape(0)));
  require_equal(what, row_bytes(f, cols), int64_t(source.shape(1)));
}

void bind_pack_expert(int dim, int ffn_dim, int gate_up, int down, const ConstByteRows& gate,
                      const ConstByteRows& up, const ConstByteRows& down_rows, const Bytes& out) {
  const ExpertShape shape = shape_from(dim, ffn_dim, gate_up, down);
  require_source("gate rows and row bytes", gate, shape.gate_up, ffn_dim, dim);
  require_source("up rows and row bytes", up, shape.gate_up, ffn_dim, dim);
  require_source("down rows and row bytes", down_rows, shape.down, dim, ffn_dim);
  require_equal("bytes of out", shape.bytes(), int64_t(out.size()));
  nb::gil_scoped_release released;
  pack_expert(shape, gate.data(), up.data(), down_rows.data(), out.data());
}

void bind_unpack_rows(int format, int rows, int cols, const ConstBytes& data, const Indices& ids,
                      const Floats& out) {
  const MatrixView m = view_matrix(format, rows, cols, data);
  require_equal("rows of out", int64_t(ids.shape(0)), int64_t(out.shape(0)));
  require_equal("columns of out", cols, int64_t(out.shape(1)));
  for (size_t i = 0; i < ids.shape(0); ++i) require_below("row index below", rows, ids.data()[i]);
  nb::gil_scoped_release released;
  parallel_for(int64_t(ids.shape(0)), 16, [&](int64_t i, int64_t end, int) {
    for (; i < end; ++i) unpack_row(m, ids.data()[i], out.data() + i * cols);
  });
}

bool bind_check_finite(int format, const ConstByteRows& source) {
  const Format f = format_from(format);
  require(int64_t(source.shape(1)) % row_bytes(f, 1) == 0, "a source row must be whole blocks");
  nb::gil_scoped_release released;
  return check_finite(f, source.data(), int64_t(source.size()));
}

void bind_quantise_q4_k(const ConstFloats& values, const Array<uint8_t, 2>& out) {
  const int cols = int(values.shape(1));
  require(cols % kSuperBlock == 0, "q4_k: columns must be a multiple of 256");
  require_equal("rows of out", int64_t(values.shape(0)), int64_t(out.shape(0)));
  require_equal("bytes of a row of out", row_bytes(Format::q4_k, cols), int64_t(out.shape(1)));
  nb::gil_scoped_release released;
  quantise_q4_k(values.data(), int64_t(values.shape(0)), cols, out.data());
}

void bind_quantise_table(int format, const ConstFloats& values, const Importance& importance,
                         const Array<uint8_t, 2>& out) {
  const Format f = format_from(format);
  const int cols = int(values.shape(1));
  require(f == Format::q4_0 || f == Format::q4_t || f == Format::q3_t,
          "quantise_table: the format must be q4_0, q4_t or q3_t");
  require(cols % kBlock == 0, "quantise_table: columns must be a multiple of 32");
  require_equal("rows of out", int64_t(values.shape(0)), int64_t(out.shape(0)));
  require_equal("bytes of a row of out", row_bytes(f, cols), int64_t(out.shape(1)));
  if (importance) require_equal("length of importance", cols, int64_t(importance->size()));
  const float* weights = importance ? importance->data() : nullptr;
  nb::gil_scoped_release released;
  quantise_table(f, values.data(), weights, int64_t(values.shape(0)), cols, out.data());
}

// --- Products ----------------------------------------------------------------------------------

BadRows bind_quantise_rows(int scheme, const ConstFloats& x, const Array<int8_t, 2>& quants,
                           const Floats& scales) {
  require(scheme == 1 || scheme == 2, "quantise_rows: scheme must be INT8_32 or INT8_256");
  const int dim = int(x.shape(1)), span = span_of(Scheme(scheme));
  const int64_t padded = round_up(dim, span), num_rows = int64_t(x.shape(0));
  require_equal("rows of quants", num_rows, int64_t(quants.shape(0)));
  require_equal("columns of quants", padded, int64_t(quants.shape(1)));
  require_equal("rows of scales", num_rows, int64_t(scales.shape(0)));
  require_equal("columns of scales", padded / span, int64_t(scales.shape(1)));
  nb::gil_scoped_release released;
  std::vector<uint8_t> bad(static_cast<size_t>(num_rows));
  quantise_rows(Scheme(scheme), x.data(), int(num_rows), dim, quants.data(), scales.data(),
                bad.data());
  return indices_of(bad);
}

BadRows bind_non_finite_rows(const ConstFloats& x) {
  nb::gil_scoped_release released;
  std::vector<uint8_t> bad(x.shape(0));
  quantise_rows(Scheme::f32, x.data(), int(x.shape(0)), int(x.shape(1)), nullptr, nullptr,
                bad.data());
  return indices_of(bad);
}

void bind_matmul(int format, int rows, int cols, const ConstBytes& data, int scheme,
                 const ActivationArray& values, const ConstFloats& scales,
                 const std::optional<Array<const float, 1>>& bias, const Floats& out) {
  const MatrixView m = view_matrix(format, rows, cols, data);
  const RowsView x = view_rows(scheme, cols, values, scales);
  require(scheme_of(m.format) == x.scheme, "matmul: the rows are not in the matrix's scheme");
  require_equal("rows of out", x.num_rows, int64_t(out.shape(0)));
  require_equal("columns of out", rows, int64_t(out.shape(1)));
  if (bias) require_equal("length of bias", rows, int64_t(bias->size()));
  const float* start = bias ? bias->data() : nullptr;
  nb::gil_scoped_release released;
  matmul(m, x, start, out.data());
}

BadRows bind_expert_ffn(int dim, int ffn_dim, int gate_up, int down, const ConstBytes& weights,
                        int scheme, const ActivationArray& values, const ConstFloats& scales,
                        const Floats& out) {
  const ExpertShape shape = shape_from(dim, ffn_dim, gate_up, down);
  const RowsView rows = view_rows(scheme, dim, values, scales);
  require(scheme_of(shape.gate_up) == rows.scheme, "expert: the rows are not in gate's scheme");
  const uint8_t* expert = expert_data(shape, weights);
  require_equal("rows of out", rows.num_rows, int64_t(out.shape(0)));
  require_equal("columns of out", dim, int64_t(out.shape(1)));
  nb::gil_scoped_release released;
  std::vector<uint8_t> bad(static_cast<size_t>(rows.num_rows));
  expert_ffn(shape, expert, rows, out.data(), bad.data());
  return indices_of(bad);
}

void require_pairs(const ExpertCall& call, const Indices& offsets, const Indices& pair_rows,
                   int64_t num_weights, int num_rows) {
  const int64_t num_pairs = int64_t(pair_rows.size());
  require_equal("length of pair_offsets", call.num_experts + 1, int64_t(offsets.size()));
  require_equal("length of pair_weights", num_pairs, num_weights);
  require_equal("first of pair_offsets", 0, call.offsets[0]);
  require_equal("last of pair_offsets", num_pairs, call.offsets[call.num_experts]);
  for (int e = 0; e < call.num_experts; ++e)
    require(call.offsets[e] <= call.offsets[e + 1], "pair_offsets must ascend");
  for (int64_t p = 0; p < num_pairs; ++p)
    require_below("pair row below", num_rows, call.pair_rows[p]);
  require(call.grid >= -100 && call.grid <= 100, "grid must be in -100..100");
}

BadRows bind_expert_sums(int dim, int ffn_dim, int gate_up, int down,
                         const std::vector<ConstBytes>& weights, int scheme,
                         const ActivationArray& values, const ConstFloats& scales,
                         const Indices& offsets, const Indices& pair_rows,
                         const Array<const float, 1>& pair_weights, int grid,
                         const Array<int64_t, 2>& sums) {
  const ExpertShape shape = shape_from(dim, ffn_dim, gate_up, down);
  const RowsView rows = view_rows(scheme, dim, values, scales);
  require(scheme_of(shape.gate_up) == rows.scheme, "expert: the rows are not in gate's scheme");
  std::vector<const uint8_t*> experts;
  for (const ConstBytes& one : weights) experts.push_back(expert_data(shape, one));
  const ExpertCall call{shape,
                        int(experts.size()),
                        experts.data(),
                        offsets.data(),
                        pair_rows.data(),
                        pair_weights.data(),
                        grid};
  require_pairs(call, offsets, pair_rows, int64_t(pair_weights.size()), rows.num_rows);
  require_equal("rows of sums", rows.num_rows, int64_t(sums.shape(0)));
  require_equal("columns of sums", dim, int64_t(sums.shape(1)));
  nb::gil_scoped_release released;
  std::vector<uint8_t> bad(static_cast<size_t>(rows.num_rows));
  expert_sums(call, rows, sums.data(), bad.data());
  return indices_of(bad);
}

// --- Process-wide choices ----------------------------------------------------------------------

Isa isa_from(const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i)
    if (name == isa_name(Isa(i))) return Isa(i);
  throw std::invalid_argument("unknown instruction set '" + name +
                              "': one of scalar, avx2, avxvnni, avx512, amx");
}

std::vector<std::string> bind_available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i)
    if (isa_available(Isa(i))) names.push_back(isa_name(Isa(i)));
  return names;
}

// Asks for 2 MiB pages; false where there are none to ask for.
bool bind_advise_huge_pages(const Bytes& memory) {
#if defined(__linux__)
  return madvise(memory.data(), memory.size(), MADV_HUGEPAGE) == 0;
#else
  (void)memory;
  return false;
#endif
}

void bind_packing(nb::module_& m) {
  m.def("pack_rows", &bind_pack_rows, "format"_a, "source"_a.noconvert(), "cols"_a,
        "out"_a.noconvert(), "Row-major rows into whole row groups.");
  m.def("pack_expert", &bind_pack_expert, "dim"_a, "ffn_dim"_a, "gate_up"_a, "down"_a,
        "gate"_a.noconvert(), "up"_a.noconvert(), "down_rows"_a.noconvert(), "out"_a.noconvert(),
        "Row-major gate, up and down into one packed expert.");
  m.def("unpack_rows", &bind_unpack_rows, "format"_a, "rows"_a, "cols"_a, "data"_a.noconvert(),
        "ids"_a.noconvert(), "out"_a.noconvert(), "Rows of a packed matrix as float32.");
  m.def("check_finite", &bind_check_finite, "format"_a, "source"_a.noconvert(),
        "Whether all scales or float weights of row-major rows are finite.");
  m.def("quantise_q4_k", &bind_quantise_q4_k, "values"_a.noconvert(), "out"_a.noconvert(),
        "Float rows to GGUF Q4_K blocks.");
  m.def("quantise_table", &bind_quantise_table, "format"_a, "values"_a.noconvert(),
        "importance"_a.noconvert().none(), "out"_a.noconvert(),
        "Float rows to blocks of a format with a table of levels.");
}

void bind_products(nb::module_& m) {
  m.def("quantise_rows", &bind_quantise_rows, "scheme"_a, "x"_a.noconvert(), "quants"_a.noconvert(),
        "scales"_a.noconvert(), "Returns the rows that are not finite.");
  m.def("non_finite_rows", &bind_non_finite_rows, "x"_a.noconvert(),
        "Returns the rows with a NaN or an infinity.");
  m.def("matmul", &bind_matmul, "format"_a, "rows"_a, "cols"_a, "data"_a.noconvert(), "scheme"_a,
        "values"_a.noconvert(), "scales"_a.noconvert(), "bias"_a.noconvert().none(),
        "out"_a.noconvert(), "out = rows * matrix^T + bias.");
  m.def("expert_ffn", &bind_expert_ffn, "dim"_a, "ffn_dim"_a, "gate_up"_a, "down"_a,
        "weights"_a.noconvert(), "scheme"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
        "out"_a.noconvert(), "One expert on all rows; returns the rows that are not finite.");
  m.def("expert_sums", &bind_expert_sums, "dim"_a, "ffn_dim"_a, "gate_up"_a, "down"_a,
        "weights"_a.noconvert(), "scheme"_a, "values"_a.noconvert(), "scales"_a.noconvert(),
        "offsets"_a.noconvert(), "pair_rows"_a.noconvert(), "pair_weights"_a.noconvert(), "grid"_a,
        "sums"_a.noconvert(), "Adds weighted integer outputs; returns the rows out of range.");
}

}  // namespace

void bind_matrices(nb::module_& m) {
  bind_packing(m);
  bind_products(m);
  m.def("set_threads", &set_pool_threads, "threads"_a, "Threads that kernels use.");
  m.def("rest_threads", &rest_threads,
        "Say that no kernel is called for a while: threads that wait for work sleep at once.");
  m.def("num_threads", &pool_threads, "Threads that kernels use.");
  m.def("usable_cpus", &usable_cpus, "CPUs of this process, by affinity and cgroup quota.");
  m.def(
      "set_isa", [](const std::string& name) { set_isa(isa_from(name)); }, "name"_a,
      "Switches all kernels to an instruction set.");
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set in use.");
  m.def("available_isas", &bind_available_isas, "What this CPU and build can run.");
  m.def("advise_huge_pages", &bind_advise_huge_pages, "memory"_a.noconvert(),
        "Asks for 2 MiB pages; false where there are none.");
}

}  // namespace shoal
