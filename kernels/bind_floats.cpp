// Python's door to the float kernels: dtypes and layouts are checked here (never converted),
// shapes that must agree too; results go into arrays that the caller allocated.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "bind_arrays.h"
#include "bind_views.h"
#include "bindings.h"
#include "combine.h"
#include "digest.h"
#include "floats.h"
#include "sample.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

template <class T>
using AnyArray = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu>;
using RowList = std::vector<int32_t>;

int64_t size_of(const AnyArray<const float>& a) { return int64_t(a.size()); }

void bind_rms_norm(const AnyArray<const float>& x, const Array<const float, 1>& weight, float eps,
                   const AnyArray<float>& out) {
  require(x.ndim() >= 1 && x.shape(x.ndim() - 1) == weight.shape(0) && weight.shape(0) > 0,
          "rms_norm: weight must have the length of x's last axis, at least 1");
  require(same_shape(x, out), "rms_norm: out must have x's shape");
  const int64_t dim = int64_t(weight.shape(0));
  nb::gil_scoped_release released;
  rms_norm(x.data(), weight.data(), eps, out.data(), size_of(x) / dim, dim);
}

void bind_add(const AnyArray<const float>& a, const AnyArray<const float>& b,
              const AnyArray<float>& out) {
  require(same_shape(a, b) && same_shape(a, out), "add: a, b and out must have one shape");
  nb::gil_scoped_release released;
  add_floats(a.data(), b.data(), out.data(), size_of(a));
}

void bind_clamp(const AnyArray<const float>& x, float limit, const AnyArray<float>& out) {
  require(same_shape(x, out), "clamp: out must have x's shape");
  require(limit > 0.0f, "clamp: limit must be positive");
  nb::gil_scoped_release released;
  clamp_floats(x.data(), limit, out.data(), size_of(x));
}

RowList bind_rope_table(const Array<const float, 1>& inv_freq, const Indices& positions,
                        float factor, const Array<float, 2>& cos, const Array<float, 2>& sin) {
  require(cos.shape(0) == positions.shape(0) && cos.shape(1) == inv_freq.shape(0) &&
              same_shape(cos, sin),
          "rope_table: cos and sin must be [positions, frequencies]");
  nb::gil_scoped_release released;
  return rope_table(inv_freq.data(), positions.data(), factor, cos.data(), sin.data(),
                    int64_t(cos.shape(0)), int64_t(cos.shape(1)));
}

void bind_rope(const Array<float, 3>& x, const Array<const float, 2>& cos,
               const Array<const float, 2>& sin) {
  require(cos.shape(0) == x.shape(0) && same_shape(cos, sin),
          "rope: cos and sin must have one row for each row of x");
  require(2 * cos.shape(1) <= x.shape(2), "rope: more rotary dimensions than a head has");
  nb::gil_scoped_release released;
  rope(x.data(), cos.data(), sin.data(), int64_t(x.shape(0)), int64_t(x.shape(1)),
       int64_t(x.shape(2)), int64_t(cos.shape(1)));
}

RowList bind_route_softmax(const Array<const float, 2>& logits, bool renormalise,
                           const Array<int32_t, 2>& experts, const Array<float, 2>& weights) {
  require(experts.shape(0) == logits.shape(0) && same_shape(experts, weights),
          "route_softmax: experts and weights must have one row for each row of logits");
  require(experts.shape(1) >= 1 && experts.shape(1) <= logits.shape(1) &&
              experts.shape(1) <= size_t(kMaxExpertsPerToken),
          "route_softmax: experts_per_token must be in 1..min(64, number of experts)");
  nb::gil_scoped_release released;
  return route_softmax(logits.data(), int64_t(logits.shape(0)), int(logits.shape(1)),
                       int(experts.shape(1)), renormalise, experts.data(), weights.data());
}

RowList bind_kv_write(const Keys& keys, const Values& values, const Array<const float, 3>& k,
                      const Array<const float, 3>& v, const Indices& slots) {
  const KvCache cache = cache_of(keys, values);
  require(
      same_shape(k, v) && int64_t(k.shape(1)) == cache.kv_heads && int64_t(k.shape(2)) == cache.dim,
      "kv_write: k and v must be [rows, KVH, d] like the cache");
  require(slots.shape(0) == k.shape(0), "kv_write: one slot for each row");
  for (size_t t = 0; t < slots.shape(0); ++t)
    require(slots.data()[t] >= 0 && slots.data()[t] < cache.num_blocks * kKvBlockTokens,
            "kv_write: a slot is outside the cache");
  nb::gil_scoped_release released;
  return kv_write(cache, k.data(), v.data(), slots.data(), int64_t(k.shape(0)));
}

// window: 0 for none.
void bind_attention(const Array<const float, 3>& q, const Keys& keys, const Values& values,
                    const Array<const int32_t, 2>& block_tables, const Indices& row_sequence,
                    const Indices& row_position, float scale, int64_t window,
                    const Array<float, 3>& out) {
  const KvCache cache = cache_of(keys, values);
  require(same_shape(q, out) && int64_t(q.shape(2)) == cache.dim &&
              int64_t(q.shape(1)) % cache.kv_heads == 0,
          "attention: q and out must be [rows, H, d], H a multiple of the cache's KVH");
  require(row_sequence.shape(0) == q.shape(0) && row_position.shape(0) == q.shape(0),
          "attention: one sequence and one position for each row");
  require(window >= 0, "attention: window must be positive");
  const AttentionCall call{q.data(),
                           out.data(),
                           int64_t(q.shape(0)),
                           int64_t(q.shape(1)),
                           block_tables.data(),
                           int64_t(block_tables.shape(0)),
                           int64_t(block_tables.shape(1)),
                           row_sequence.data(),
                           row_position.data(),
                           scale,
                           window == 0 ? INT64_MAX : window};
  const std::string wrong = check_attention(cache, call);
  if (!wrong.empty()) throw nb::value_error(("attention: " + wrong).c_str());
  nb::gil_scoped_release released;
  attention(cache, call);
}

void bind_finish_sums(const Array<const int64_t, 2>& sums, int grid, const Array<float, 2>& out) {
  require(same_shape(sums, out), "finish_sums: out must have the shape of sums");
  require(grid >= -126 && grid <= 126, "finish_sums: grid must be in -126..126");
  nb::gil_scoped_release released;
  finish_sums(sums.data(), grid, out.data(), int64_t(sums.size()));
}

int64_t bind_sum_widths(const Array<const int64_t, 2>& sums, const Array<uint8_t, 1>& widths) {
  require(sums.shape(0) == widths.shape(0) && sums.shape(1) > 0,
          "sum_widths: one width for each row of sums");
  nb::gil_scoped_release released;
  return sum_widths(sums.data(), int64_t(sums.shape(0)), int64_t(sums.shape(1)), widths.data());
}

// The Python front allocates `data` with the size that sum_widths returned for these sums.
void bind_pack_sums(const Array<const int64_t, 2>& sums, const Array<const uint8_t, 1>& widths,
                    const Array<uint8_t, 1>& data) {
  require(sums.shape(0) == widths.shape(0), "pack_sums: one width for each row of sums");
  int64_t num_bytes = 0;
  for (size_t t = 0; t < widths.shape(0); ++t)
    num_bytes += int64_t(widths.data()[t]) * int64_t(sums.shape(1));
  require(num_bytes == int64_t(data.shape(0)), "pack_sums: data must have the widths' size");
  nb::gil_scoped_release released;
  pack_sums(sums.data(), int64_t(sums.shape(0)), int64_t(sums.shape(1)), widths.data(),
            data.data());
}

void bind_unpack_add_sums(const Array<const uint8_t, 1>& widths,
                          const Array<const uint8_t, 1>& data, const Indices& rows,
                          const Array<int64_t, 2>& into) {
  require(widths.shape(0) == rows.shape(0), "unpack_add_sums: one width for each row");
  std::string wrong;
  {
    nb::gil_scoped_release released;
    wrong = unpack_add_sums(widths.data(), int64_t(widths.shape(0)), data.data(),
                            int64_t(data.shape(0)), rows.data(), into.data(),
                            int64_t(into.shape(0)), int64_t(into.shape(1)));
  }
  if (!wrong.empty()) throw nb::value_error(("unpack_add_sums: " + wrong).c_str());
}

void require_grid_of_bf16(int grid) {
  require(grid >= -64 && grid <= 96, "bf16: the grid must be in -64..96");
}

void bind_pack_bf16(const Array<const int64_t, 2>& sums, int grid, const Array<uint8_t, 1>& data) {
  require_grid_of_bf16(grid);
  require(2 * sums.size() == data.size(), "pack_bf16: two bytes for each sum");
  nb::gil_scoped_release released;
  pack_bf16(sums.data(), grid, data.data(), int64_t(sums.size()));
}

void bind_unpack_add_bf16(const Array<const uint8_t, 1>& data, int grid, const Indices& rows,
                          const Array<int64_t, 2>& into) {
  require_grid_of_bf16(grid);
  require(2 * rows.shape(0) * into.shape(1) == data.size(),
          "unpack_add_bf16: two bytes for each value");
  std::string wrong;
  {
    nb::gil_scoped_release released;
    wrong = unpack_add_bf16(data.data(), int64_t(rows.shape(0)), grid, rows.data(), into.data(),
                            int64_t(into.shape(0)), int64_t(into.shape(1)));
  }
  if (!wrong.empty()) throw nb::value_error(("unpack_add_bf16: " + wrong).c_str());
}

bool bind_all_finite(const AnyArray<const float>& x) {
  nb::gil_scoped_release released;
  return all_finite(x.data(), size_of(x));
}

void check_ids(const int32_t* ids, size_t n, size_t vocab, const char* what) {
  for (size_t i = 0; i < n; ++i) require(ids[i] >= 0 && size_t(ids[i]) < vocab, what);
}

// logits must be finite, params checked: shoal/ops/sampling.py does both.
int32_t bind_sample(const Array<const float, 1>& logits, const Indices& history, float temperature,
                    int64_t top_k, double top_p, double min_p, float repetition_penalty,
                    float presence_penalty, float frequency_penalty, const Indices& bias_ids,
                    const Array<const float, 1>& biases, uint64_t seed, uint32_t choice,
                    uint32_t position) {
  const size_t vocab = logits.shape(0);
  require(vocab > 0 && vocab < size_t(INT32_MAX), "sample: no logits");
  check_ids(history.data(), history.shape(0), vocab, "sample: history names an id beyond logits");
  check_ids(bias_ids.data(), bias_ids.shape(0), vocab,
            "sample: logit_bias names an id beyond logits");
  require(bias_ids.shape(0) == biases.shape(0), "sample: one bias for each id");
  SampleParams params{temperature,       top_k, top_p, min_p, repetition_penalty, presence_penalty,
                      frequency_penalty, {}};
  for (size_t i = 0; i < biases.shape(0); ++i)
    params.logit_bias.emplace_back(bias_ids.data()[i], biases.data()[i]);
  const RowList seen(history.data(), history.data() + history.shape(0));
  nb::gil_scoped_release released;
  return sample(logits.data(), int64_t(vocab), params, seen, {seed, choice, position});
}

void bind_top_logprobs(const Array<const float, 1>& logits, const Array<int32_t, 1>& ids,
                       const Array<float, 1>& logprobs) {
  require(same_shape(ids, logprobs) && ids.shape(0) <= logits.shape(0) && logits.shape(0) > 0,
          "top_logprobs: k must be at most the number of logits");
  nb::gil_scoped_release released;
  top_logprobs(logits.data(), int64_t(logits.shape(0)), int64_t(ids.shape(0)), ids.data(),
               logprobs.data());
}

float bind_logprob_of(const Array<const float, 1>& logits, int32_t token) {
  check_ids(&token, 1, logits.shape(0), "logprob_of: no such token");
  nb::gil_scoped_release released;
  return logprob_of(logits.data(), int64_t(logits.shape(0)), token);
}

using NamedDigest = std::tuple<std::string, std::string, uint64_t>;

std::vector<NamedDigest> bind_compute_digests() {
  std::vector<NamedDigest> named;
  nb::gil_scoped_release released;
  for (const OpDigest& d : compute_digests()) named.emplace_back(d.op, d.format, d.value);
  return named;
}

void bind_kv(nb::module_& m) {
  m.def("kv_write", bind_kv_write, "keys"_a.noconvert(), "values"_a.noconvert(), "k"_a.noconvert(),
        "v"_a.noconvert(), "slots"_a.noconvert(),
        "Store k and v [T, KVH, d] in the cache; returns the rows that are not finite there.");
  m.def("attention", bind_attention, "q"_a.noconvert(), "keys"_a.noconvert(),
        "values"_a.noconvert(), "block_tables"_a.noconvert(), "row_sequence"_a.noconvert(),
        "row_position"_a.noconvert(), "scale"_a, "window"_a, "out"_a.noconvert(),
        "Grouped-query attention of q [T, H, d] over the paged cache; window 0 for none.");
}

void bind_layers(nb::module_& m) {
  m.def("rms_norm", bind_rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
        "out"_a.noconvert(), "RMSNorm over the last axis.");
  m.def("add", bind_add, "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert(), "out = a + b.");
  m.def("clamp", bind_clamp, "x"_a.noconvert(), "limit"_a, "out"_a.noconvert(),
        "out = x cut to [-limit, limit].");
  m.def("rope_table", bind_rope_table, "inv_freq"_a.noconvert(), "positions"_a.noconvert(),
        "factor"_a, "cos"_a.noconvert(), "sin"_a.noconvert(),
        "Fill cos and sin [T, r/2]; returns the rows whose angle is too large.");
  m.def("rope", bind_rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(),
        "Turn the first dimensions of each head of x [T, H, d] in place, rotate-half.");
  m.def("route_softmax", bind_route_softmax, "logits"_a.noconvert(), "renormalise"_a,
        "experts"_a.noconvert(), "weights"_a.noconvert(),
        "Softmax and the largest experts of each row; returns the rows that are not finite.");
  bind_kv(m);
}

void bind_combine(nb::module_& m) {
  m.def("finish_sums", bind_finish_sums, "sums"_a.noconvert(), "grid"_a, "out"_a.noconvert(),
        "out = float32(sums) * 2^-grid.");
  m.def("sum_widths", bind_sum_widths, "sums"_a.noconvert(), "widths"_a.noconvert(),
        "Bytes a value of each row; returns the bytes of all rows.");
  m.def("pack_sums", bind_pack_sums, "sums"_a.noconvert(), "widths"_a.noconvert(),
        "data"_a.noconvert(), "Write rows of sums, little-endian.");
  m.def("unpack_add_sums", bind_unpack_add_sums, "widths"_a.noconvert(), "data"_a.noconvert(),
        "rows"_a.noconvert(), "into"_a.noconvert(), "Add packed rows to rows of `into`.");
  m.def("pack_bf16", bind_pack_bf16, "sums"_a.noconvert(), "grid"_a, "data"_a.noconvert(),
        "Round sums * 2^-grid to bfloat16, little-endian.");
  m.def("unpack_add_bf16", bind_unpack_add_bf16, "data"_a.noconvert(), "grid"_a,
        "rows"_a.noconvert(), "into"_a.noconvert(), "Add rows of bfloat16 to rows of `into`.");
}

void bind_sampling(nb::module_& m) {
  m.def("all_finite", bind_all_finite, "x"_a.noconvert(), "No NaN and no infinity in x.");
  m.def("sample", bind_sample, "logits"_a.noconvert(), "history"_a.noconvert(), "temperature"_a,
        "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a, "presence_penalty"_a,
        "frequency_penalty"_a, "bias_ids"_a.noconvert(), "biases"_a.noconvert(), "seed"_a,
        "choice"_a, "position"_a, "The token drawn from logits [V].");
  m.def("top_logprobs", bind_top_logprobs, "logits"_a.noconvert(), "ids"_a.noconvert(),
        "logprobs"_a.noconvert(), "Ids and log-probabilities of the largest logits.");
  m.def("logprob_of", bind_logprob_of, "logits"_a.noconvert(), "token"_a,
        "Log-probability of one token.");
}

}  // namespace

void bind_floats(nb::module_& m) {
  bind_layers(m);
  bind_combine(m);
  bind_sampling(m);
  m.def("compute_digests", bind_compute_digests,
        "(op, format, digest) of every op on the current instruction set.");
}

}  // namespace shoal
