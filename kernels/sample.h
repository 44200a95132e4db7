// Choosing a token from logits, and log-probabilities (exactness rule 7; docs/numerics.md).
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace shoal {

struct SampleParams {
  float temperature;         // 0: the largest logit
  int64_t top_k;             // 0: all
  double top_p, min_p;       // 1 and 0: all
  float repetition_penalty;  // 1: none
  float presence_penalty, frequency_penalty;
  std::vector<std::pair<int32_t, float>> logit_bias;  // -infinity bans a token
};

// Which draw this is: the same for every way of serving the request.
struct SampleKey {
  uint64_t seed;
  uint32_t choice, position;
};

// The token drawn from finite logits[vocab].  history: ids below vocab that penalties see; choice:
// of a request's `n` alternatives.  Throws std::invalid_argument when every token is banned.
int32_t sample(const float* logits, int64_t vocab, const SampleParams& params,
               const std::vector<int32_t>& history, SampleKey key);

// The k tokens of largest finite logit, descending, ties to the lower id, and their natural log
// probabilities under softmax of all the logits.
void top_logprobs(const float* logits, int64_t vocab, int64_t k, int32_t* ids, float* logprobs);

float logprob_of(const float* logits, int64_t vocab, int32_t token);

// What is added to a token's logit before the largest is taken.
double gumbel_noise_of(SampleKey key, int32_t id);

// One implementation for one instruction set, without threads.
struct SampleTable {
  // masses[i] = 2^40 * exp(x[i] - top), rounded to nearest even; 0 where x[i] is -infinity.
  void (*masses)(const float* x, float top, int64_t n, int64_t* masses);
  // noise[i] = -log(-log u_i), u_i from Philox4x32-10 with key.seed at (ids[i], position, choice).
  void (*noise)(SampleKey key, const int32_t* ids, int64_t n, double* noise);
};
extern const SampleTable kSampleScalar, kSampleAvx2, kSampleAvx512;

}  // namespace shoal
