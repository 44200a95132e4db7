// Penalties, candidate cuts and the draw.  Everything that decides is an integer or one IEEE
// operation, so that a token never depends on the machine.
#include "sample.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>

#include "cpu_features.h"
#include "exact_log.h"
#include "float_environment.h"
#include "isa_table.h"
#include "thread_pool.h"

namespace shoal {
namespace {

constexpr int64_t kTokensPerChunk = 4096;
constexpr float kBanned = -std::numeric_limits<float>::infinity();

const SampleTable& table() { return SHOAL_ISA_TABLE(kSample); }

// A token as an integer: a larger logit is larger, then a lower id.
using Candidate = uint64_t;

Candidate candidate(float logit, int32_t id) {
  const float no_negative_zero = logit + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &no_negative_zero, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | (0xFFFFFFFFu - uint32_t(id));
}

int32_t id_of(Candidate c) { return int32_t(0xFFFFFFFFu - uint32_t(c)); }

int64_t total_of(const std::vector<int64_t>& masses) {
  int64_t total = 0;
  for (const int64_t mass : masses) total += mass;
  return total;
}

std::vector<int64_t> masses_of(const std::vector<float>& logits, float top) {
  const auto kernel = table().masses;
  std::vector<int64_t> masses(logits.size());
  parallel_for(int64_t(logits.size()), kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
    kernel(logits.data() + begin, top, end - begin, masses.data() + begin);
  });
  return masses;
}

void add_bias(std::vector<float>& logits, const SampleParams& params) {
  for (const auto& [id, bias] : params.logit_bias) logits[size_t(id)] = logits[size_t(id)] + bias;
}

// Repetition divides positive logits and multiplies the others; frequency and presence subtract.
void penalise(std::vector<float>& logits, const SampleParams& params,
              std::vector<int32_t> history) {
  std::sort(history.begin(), history.end());
  for (size_t i = 0; i < history.size();) {
    size_t end = i;
    while (end < history.size() && history[end] == history[i]) ++end;
    float& logit = logits[size_t(history[i])];
    const float repetition = params.repetition_penalty;
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    logit = logit - params.frequency_penalty * float(end - i);
    logit = logit - params.presence_penalty;
    i = end;
  }
}

int32_t largest(const std::vector<float>& logits) {
  const auto at = std::max_element(logits.begin(), logits.end());
  if (!(*at > kBanned)) throw std::invalid_argument("every token is banned by logit_bias");
  return int32_t(at - logits.begin());
}

// fraction in [0, 1] in units of 2^-32, rounded to nearest even.
uint64_t fixed_point(double fraction) {
  constexpr double kRounder = 0x1.8p52;
  return uint64_t((fraction * 0x1p32 + kRounder) - kRounder);
}

bool is_below(uint64_t part, uint64_t fraction, uint64_t total) {
  using Wide = unsigned __int128;
  return (Wide(part) << 32) < Wide(fraction) * total;
}

std::vector<float> logits_of(const std::vector<Candidate>& chosen,
                             const std::vector<float>& logits) {
  std::vector<float> values(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) values[i] = logits[size_t(id_of(chosen[i]))];
  return values;
}

// The shortest run of largest candidates that holds `top_p` of the mass of all of them.
void cut_top_p(std::vector<Candidate>& chosen, const std::vector<float>& logits, float top,
               double top_p) {
  const uint64_t total = uint64_t(total_of(masses_of(logits_of(chosen, logits), top)));
  const uint64_t fraction = fixed_point(top_p);
  for (size_t sorted = 256;; sorted *= 8) {
    sorted = std::min(sorted, chosen.size());
    std::partial_sort(chosen.begin(), chosen.begin() + std::ptrdiff_t(sorted), chosen.end(),
                      std::greater<>());
    const std::vector<Candidate> head(chosen.begin(), chosen.begin() + std::ptrdiff_t(sorted));
    const std::vector<int64_t> masses = masses_of(logits_of(head, logits), top);
    uint64_t before = uint64_t(masses[0]);
    size_t kept = 1;
    for (; kept < sorted && is_below(before, fraction, total); ++kept)
      before += uint64_t(masses[kept]);
    if (kept < sorted || sorted == chosen.size()) {
      chosen.resize(kept);
      return;
    }
  }
}

// Candidates with at least `min_p` of the largest one's mass.
void cut_min_p(std::vector<Candidate>& chosen, const std::vector<float>& logits, float top,
               double min_p) {
  const std::vector<int64_t> masses = masses_of(logits_of(chosen, logits), top);
  const uint64_t fraction = fixed_point(min_p);
  size_t kept = 0;
  for (size_t i = 0; i < chosen.size(); ++i)
    if (!is_below(uint64_t(masses[i]), fraction, uint64_t(1) << 40)) chosen[kept++] = chosen[i];
  chosen.resize(kept);
}

std::vector<int32_t> unbanned(const std::vector<float>& logits) {
  std::vector<int32_t> ids(logits.size());
  size_t kept = 0;
  for (size_t id = 0; id < logits.size(); ++id) {
    ids[kept] = int32_t(id);
    kept += logits[id] > kBanned;
  }
  ids.resize(kept);
  return ids;
}

std::vector<int32_t> candidates(const std::vector<float>& logits, float top,
                                const SampleParams& params) {
  if (params.top_k == 0 && params.top_p == 1.0 && params.min_p == 0.0) return unbanned(logits);
  std::vector<Candidate> chosen;
  chosen.reserve(logits.size());
  for (size_t id = 0; id < logits.size(); ++id)
    if (logits[id] > kBanned) chosen.push_back(candidate(logits[id], int32_t(id)));
  if (params.top_k > 0 && size_t(params.top_k) < chosen.size()) {
    const auto kth = chosen.begin() + std::ptrdiff_t(params.top_k);
    std::nth_element(chosen.begin(), kth, chosen.end(), std::greater<>());
    chosen.erase(kth, chosen.end());
  }
  if (params.top_p < 1.0) cut_top_p(chosen, logits, top, params.top_p);
  if (params.min_p > 0.0) cut_min_p(chosen, logits, top, params.min_p);
  std::vector<int32_t> ids(chosen.size());
  std::transform(chosen.begin(), chosen.end(), ids.begin(), id_of);
  return ids;
}

// argmax of logit + noise, ties to the lower id.
int32_t draw(const std::vector<float>& logits, const std::vector<int32_t>& ids, SampleKey key) {
  struct Best {
    double value;
    int32_t id;
  };
  const auto kernel = table().noise;
  const int64_t n = int64_t(ids.size());
  std::vector<Best> best(size_t((n + kTokensPerChunk - 1) / kTokensPerChunk));
  const auto better = [](const Best& a, const Best& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  };
  parallel_for(n, kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
    double* noise = static_cast<double*>(thread_scratch(kTokensPerChunk * 8));
    kernel(key, ids.data() + begin, end - begin, noise);
    Best found{double(logits[size_t(ids[size_t(begin)])]) + noise[0], ids[size_t(begin)]};
    for (int64_t i = begin + 1; i < end; ++i) {
      const int32_t id = ids[size_t(i)];
      const Best next{double(logits[size_t(id)]) + noise[i - begin], id};
      if (better(next, found)) found = next;
    }
    best[size_t(begin / kTokensPerChunk)] = found;
  });
  Best found = best[0];
  for (const Best& next : best)
    if (better(next, found)) found = next;
  return found.id;
}

float logprob(float logit, float top, double log_total) {
  return float((double(logit) - double(top)) - log_total);
}

// log of the sum of exp(logit - top).
double log_total_of(const std::vector<float>& logits, float top) {
  return log_of(double(total_of(masses_of(logits, top))) * 0x1p-40);
}

}  // namespace

double gumbel_noise_of(SampleKey key, int32_t id) {
  double noise;
  table().noise(key, &id, 1, &noise);
  return noise;
}

int32_t sample(const float* raw, int64_t vocab, const SampleParams& params,
               const std::vector<int32_t>& history, SampleKey key) {
  const FloatEnvironment pinned;
  std::vector<float> logits(raw, raw + vocab);
  add_bias(logits, params);
  penalise(logits, params, history);
  const int32_t first = largest(logits);
  if (params.temperature == 0.0f) return first;
  for (float& logit : logits) logit = logit / params.temperature;
  const float top = logits[size_t(first)];
  if (!(top < -kBanned)) throw std::invalid_argument("logits overflow after bias and temperature");
  return draw(logits, candidates(logits, top, params), key);
}

void top_logprobs(const float* raw, int64_t vocab, int64_t k, int32_t* ids, float* logprobs) {
  const FloatEnvironment pinned;
  const std::vector<float> logits(raw, raw + vocab);
  std::vector<Candidate> order(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) order[id] = candidate(logits[id], int32_t(id));
  std::partial_sort(order.begin(), order.begin() + std::ptrdiff_t(k), order.end(),
                    std::greater<>());
  const float top = *std::max_element(logits.begin(), logits.end());
  const double log_total = log_total_of(logits, top);
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = id_of(order[size_t(i)]);
    logprobs[i] = logprob(logits[size_t(ids[i])], top, log_total);
  }
}

float logprob_of(const float* raw, int64_t vocab, int32_t token) {
  const FloatEnvironment pinned;
  const std::vector<float> logits(raw, raw + vocab);
  const float top = *std::max_element(logits.begin(), logits.end());
  return logprob(logits[size_t(token)], top, log_total_of(logits, top));
}

}  // namespace shoal
