// Python's door to store_guess.h: every index is checked to lie inside its array.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.h"
#include "store_guess.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

template <class T, size_t N>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Ids = Array<const int64_t, 1>;

void check(bool is_right, const char* what) {
  if (!is_right) throw nb::value_error(what);
}

void check_ids(const Ids& ids, size_t limit, const char* what) {
  for (size_t i = 0; i < ids.size(); ++i)
    check(ids.data()[i] >= 0 && size_t(ids.data()[i]) < limit, what);
}

FusedModel model_of(const Ids& first, const Array<double, 1>& weights, double* squares, double bias,
                    size_t num_z, double z_width, const Array<const int64_t, 2>& features) {
  const size_t experts = features.shape(1);
  check(first.size() == features.shape(0), "first: a place a feature");
  for (size_t f = 0; f < first.size(); ++f) {
    const int64_t end = f + 1 < first.size() ? first.data()[f + 1] : int64_t(weights.size());
    const int64_t limit = end - first.data()[f];
    check(first.data()[f] >= 0 && end <= int64_t(weights.size()), "first: beyond the weights");
    for (size_t e = 0; e < experts; ++e) {
      const int64_t bin = features.data()[f * experts + e];
      check(bin >= 0 && bin < limit, "features: a bin that there is not");
    }
  }
  check(num_z > 0 && z_width > 0, "z: no bins");
  return {first.data(), int(first.size()), weights.data(), squares, int(weights.size()),
          bias,         int(num_z),        z_width};
}

}  // namespace

void bind_guess(nb::module_& m) {
  m.def(
      "gate_bins",
      [](const Array<const float, 2>& scores, int parts, int chosen, int num_bins, float spread,
         const Array<int64_t, 1>& bins) {
        const size_t experts = bins.size();
        check(parts > 0 && scores.shape(1) == parts * experts, "scores: [T, parts * E]");
        check(chosen > 0 && size_t(chosen) < experts && num_bins > 0, "chosen: in [1, E)");
        gate_bins(scores.data(), int(scores.shape(0)), parts, int(experts), chosen, num_bins,
                  spread, bins.data());
      },
      "scores"_a, "parts"_a, "chosen"_a, "num_bins"_a, "spread"_a, "bins"_a,
      "Bins of how far each expert is inside some row's choice.");
  m.def(
      "chain_bins",
      [](const Array<const float, 2>& ratios, const Ids& before,
         const Array<const float, 1>& frequency, int num_bins, const Array<int64_t, 1>& bins) {
        check(ratios.shape(1) == bins.size() && frequency.size() == bins.size(), "ratios: [E1, E]");
        check_ids(before, ratios.shape(0), "before: no such expert");
        check(num_bins > 0, "num_bins: none");
        chain_bins(ratios.data(), before.data(), before.size(), frequency.data(), int(bins.size()),
                   num_bins, bins.data());
      },
      "ratios"_a, "before"_a, "frequency"_a, "num_bins"_a, "bins"_a,
      "Bins of how likely each expert is after those before.");
  m.def(
      "chain_learn",
      [](const Array<float, 2>& pairs, const Array<float, 1>& uses, const Ids& before,
         const Ids& used, const Array<const float, 1>& frequency, float weight, float prior,
         bool refreshes, const Array<float, 2>& ratios) {
        const size_t rows = pairs.shape(0), experts = pairs.shape(1);
        check(uses.size() == rows && frequency.size() == experts, "uses: [E1], frequency: [E]");
        check(ratios.shape(0) == rows && ratios.shape(1) == experts, "ratios: [E1, E]");
        check_ids(before, rows, "before: no such expert");
        check_ids(used, experts, "used: no such expert");
        chain_learn(pairs.data(), uses.data(), before.data(), before.size(), used.data(),
                    used.size(), frequency.data(), int(experts), weight, prior, refreshes,
                    ratios.data());
      },
      "pairs"_a, "uses"_a, "before"_a, "used"_a, "frequency"_a, "weight"_a, "prior"_a,
      "refreshes"_a, "ratios"_a, "Count which experts followed which.");
  m.def(
      "note_uses",
      [](const Array<int64_t, 2>& bins, const Array<double, 1>& lately, const Ids& used, int bits,
         double decay, double scale, int num_bins) {
        const size_t experts = lately.size();
        check(bins.shape(0) == 2 && bins.shape(1) == experts, "bins: [2, E]");
        check(bits > 0 && bits < 63 && num_bins > 0, "bits: in [1, 63)");
        check_ids(used, experts, "used: no such expert");
        note_uses(bins.data(), lately.data(), bins.data() + experts, int(experts), used.data(),
                  used.size(), bits, decay, scale, num_bins);
      },
      "bins"_a, "lately"_a, "used"_a, "bits"_a, "decay"_a, "scale"_a, "num_bins"_a,
      "Remember which experts a call used.");
  m.def(
      "rank_experts",
      [](const Ids& first, const Array<double, 1>& weights, double bias, double z_width,
         const Array<const double, 1>& probability, const Array<const int64_t, 2>& features,
         const Ids& owned, const Array<int64_t, 1>& ranked, const Array<double, 1>& chances) {
        const FusedModel model =
            model_of(first, weights, nullptr, bias, probability.size(), z_width, features);
        check_ids(owned, features.shape(1), "owned: no such expert");
        check(ranked.size() == owned.size() && chances.size() == owned.size(), "ranked: [owned]");
        rank_experts(model, features.data(), int(features.shape(1)), probability.data(),
                     owned.data(), owned.size(), ranked.data(), chances.data());
      },
      "first"_a, "weights"_a, "bias"_a, "z_width"_a, "probability"_a, "features"_a, "owned"_a,
      "ranked"_a, "chances"_a, "Rank owned experts by falling probability.");
  m.def(
      "learn_experts",
      [](const Ids& first, const Array<double, 1>& weights, const Array<double, 1>& squares,
         double bias, double z_width, int num_z, const Array<const int64_t, 2>& features,
         const Array<const bool, 1>& truth, double step, double forget,
         const Array<int64_t, 1>& z_bins) {
        check(squares.size() == weights.size(), "squares: one a weight");
        const FusedModel model =
            model_of(first, weights, squares.data(), bias, size_t(num_z), z_width, features);
        const size_t experts = features.shape(1);
        check(truth.size() == experts && z_bins.size() == experts, "truth, z_bins: [E]");
        learn_experts(model, features.data(), int(experts),
                      reinterpret_cast<const uint8_t*>(truth.data()), step, forget, z_bins.data());
      },
      "first"_a, "weights"_a, "squares"_a, "bias"_a, "z_width"_a, "num_z"_a, "features"_a,
      "truth"_a, "step"_a, "forget"_a, "z_bins"_a, "Move the weights towards what was wanted.");
}

}  // namespace shoal
