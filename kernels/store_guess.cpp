// The loops of store_guess.h.
#include "store_guess.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

namespace shoal {

namespace {

// Rounded towards zero, within [0, num_bins).
int64_t bin_of(float value, int num_bins) {
  return int64_t(std::min(std::max(value, 0.0f), float(num_bins - 1)));
}

float finite(float value) {  // NaN: the lowest; a row that holds any is refused later
  constexpr float kFar = 1e30f;
  return value >= -kFar ? std::min(value, kFar) : -kFar;
}

int z_bin(const FusedModel& model, const int64_t* features, int experts, int expert, double* z) {
  *z = model.bias;
  for (int f = 0; f < model.num_features; ++f) {
    *z += model.weights[model.first[f] + features[f * experts + expert]];
  }
  const double place = *z / model.z_width + model.num_z / 2;
  return int(std::min(std::max(place, 0.0), double(model.num_z - 1)));
}

}  // namespace

void gate_bins(const float* scores, int rows, int parts, int experts, int chosen, int num_bins,
               float spread, int64_t* bins) {
  std::vector<float> total(experts), sorted(experts), best(experts, -1e30f);
  for (int row = 0; row < rows; ++row, scores += size_t(parts) * experts) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (int part = 0; part < parts; ++part)
      for (int e = 0; e < experts; ++e) total[e] += scores[part * experts + e];
    for (float& value : total) value = finite(value);
    sorted = total;
    std::nth_element(sorted.begin(), sorted.begin() + chosen, sorted.end(), std::greater<>());
    const float last = *std::min_element(sorted.begin(), sorted.begin() + chosen);
    const float middle = (last + sorted[chosen]) / 2;
    float sum = 0;
    for (const float value : total) sum += std::fabs(value - middle);
    const float scale = spread / std::max(sum / float(experts), 1e-20f);
    for (int e = 0; e < experts; ++e) best[e] = std::max(best[e], (total[e] - middle) * scale);
  }
  for (int e = 0; e < experts; ++e) bins[e] = bin_of(best[e] + float(num_bins / 2), num_bins);
}

void chain_bins(const float* ratios, const int64_t* before, size_t num_before,
                const float* frequency, int experts, int num_bins, int64_t* bins) {
  std::vector<float> sum(frequency, frequency + experts);
  for (size_t i = 0; i < num_before; ++i) {
    const float* ratio = ratios + before[i] * experts;
    for (int e = 0; e < experts; ++e) sum[e] += ratio[e];
  }
  for (int e = 0; e < experts; ++e) bins[e] = bin_of(sum[e] * 2 + float(num_bins - 4), num_bins);
}

void chain_learn(float* pairs, float* uses, const int64_t* before, size_t num_before,
                 const int64_t* used, size_t num_used, const float* frequency, int experts,
                 float weight, float prior, bool refreshes, float* ratios) {
  for (size_t i = 0; i < num_before; ++i) {
    const int64_t b = before[i];
    float* pair = pairs + b * experts;
    for (size_t u = 0; u < num_used; ++u) pair[used[u]] += weight;
    uses[b] += weight;
    if (!refreshes) continue;
    const float all = uses[b] + prior, unseen = std::log(prior / all);  // most pairs never are
    for (int e = 0; e < experts; ++e) {
      const float seen = pair[e] + prior * frequency[e];
      ratios[b * experts + e] = pair[e] == 0.0f ? unseen : std::log(seen / (all * frequency[e]));
    }
  }
}

void note_uses(int64_t* recent, double* lately, int64_t* lately_bins, int experts,
               const int64_t* used, size_t num_used, int bits, double decay, double scale,
               int num_bins) {
  for (int e = 0; e < experts; ++e) {
    recent[e] >>= 1;
    lately[e] *= decay;
  }
  for (size_t i = 0; i < num_used; ++i) {
    recent[used[i]] |= int64_t{1} << (bits - 1);
    lately[used[i]] += 1 - decay;
  }
  for (int e = 0; e < experts; ++e) lately_bins[e] = bin_of(float(lately[e] * scale), num_bins);
}

void rank_experts(const FusedModel& model, const int64_t* features, int experts,
                  const double* probability, const int64_t* owned, size_t num_owned,
                  int64_t* ranked, double* chances) {
  std::vector<std::pair<double, int64_t>> found(num_owned);
  double z;
  for (size_t i = 0; i < num_owned; ++i) {
    const int bin = z_bin(model, features, experts, int(owned[i]), &z);
    found[i] = {-probability[bin], owned[i]};
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < num_owned; ++i) {
    ranked[i] = found[i].second;
    chances[i] = -found[i].first;
  }
}

void learn_experts(const FusedModel& model, const int64_t* features, int experts,
                   const uint8_t* truth, double step, double forget, int64_t* z_bins) {
  std::vector<double> gradient(model.num_weights, 0.0);
  for (int e = 0; e < experts; ++e) {
    double z;
    z_bins[e] = z_bin(model, features, experts, e, &z);
    const double residual = double(truth[e]) - 1 / (1 + std::exp(-z));
    for (int f = 0; f < model.num_features; ++f) {
      gradient[model.first[f] + features[f * experts + e]] += residual;
    }
  }
  for (int w = 0; w < model.num_weights; ++w) {
    model.squares[w] = model.squares[w] * forget + gradient[w] * gradient[w];
    model.weights[w] += step * gradient[w] / std::sqrt(model.squares[w]);
  }
}

}  // namespace shoal
