// What reading ahead computes at every call, on arrays of one number an expert: a few microseconds
// here, a hundred in a dozen NumPy calls each.  shoal/experts/prefetch says what it means.  None of
// it ever touches a token.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

// bins[e]: how far expert e is inside some row's choice of `chosen` experts, or outside all; zero
// lies half way between the last one chosen and the first one not, a bin is 1 / `spread` of the
// mean distance from there.  scores: [rows, parts * experts], a score is the sum over parts; they
// may hold anything.  1 <= chosen < experts.
void gate_bins(const float* scores, int rows, int parts, int experts, int chosen, int num_bins,
               float spread, int64_t* bins);

// bins[e] of the sum over `before` of ratios[b, e], and frequency[e]: two bins for a factor of e.
void chain_bins(const float* ratios, const int64_t* before, size_t num_before,
                const float* frequency, int experts, int num_bins, int64_t* bins);

// Counts that `used` followed `before`, and if asked brings ratios[b, :] up to date:
// log((pairs + prior * frequency) / ((uses + prior) * frequency)).
void chain_learn(float* pairs, float* uses, const int64_t* before, size_t num_before,
                 const int64_t* used, size_t num_used, const float* frequency, int experts,
                 float weight, float prior, bool refreshes, float* ratios);

// recent[e]: a bit a call, the newest the highest of `bits`; lately[e]: a share that decays, and
// its bin, of which `scale` make a whole.
void note_uses(int64_t* recent, double* lately, int64_t* lately_bins, int experts,
               const int64_t* used, size_t num_used, int bits, double decay, double scale,
               int num_bins);

// The additive model of shoal/experts/prefetch/fusion.py: weights and squares of all features' bins
// one after the other, feature f's from first[f] on; probability: of num_z bins of z, each z_width
// wide, the middle one at zero.
struct FusedModel {
  const int64_t* first;
  int num_features;
  double *weights, *squares;
  int num_weights;
  double bias;
  int num_z;
  double z_width;
};

// ranked: those of `owned` by falling probability, equals in their order; chances: theirs.
void rank_experts(const FusedModel& model, const int64_t* features, int experts,
                  const double* probability, const int64_t* owned, size_t num_owned,
                  int64_t* ranked, double* chances);

// One step of AdaGrad towards `truth`; z_bins[e]: each expert's bin before it.
void learn_experts(const FusedModel& model, const int64_t* features, int experts,
                   const uint8_t* truth, double step, double forget, int64_t* z_bins);

}  // namespace shoal
