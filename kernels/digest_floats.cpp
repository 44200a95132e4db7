// Digests of norms, rope, routing, attention, combine and sampling.
#include <cstddef>

#include "attention.h"
#include "combine.h"
#include "digest.h"
#include "floats.h"
#include "sample.h"

namespace shoal {
namespace {

template <class T>
uint64_t hash_of(const std::vector<T>& values) {
  Hash hash;
  hash.add(values);
  return hash.value();
}

void digest_elementwise(std::vector<OpDigest>& digests) {
  constexpr int64_t kRows = 40, kDim = 100;
  Inputs inputs(40);
  const std::vector<float> x = inputs.values(kRows * kDim), w = inputs.values(kDim);
  std::vector<float> out(x.size());
  rms_norm(x.data(), w.data(), 1e-6f, out.data(), kRows, kDim);
  digests.push_back({"rms_norm", "f32", hash_of(out)});
  const std::vector<float> y = inputs.values(kRows * kDim);
  add_floats(x.data(), y.data(), out.data(), kRows * kDim);
  digests.push_back({"add", "f32", hash_of(out)});
  clamp_floats(x.data(), 0.75f, out.data(), kRows * kDim);
  digests.push_back({"clamp", "f32", hash_of(out)});
}

void digest_rope(std::vector<OpDigest>& digests) {
  constexpr int64_t kRows = 24, kHeads = 2, kDim = 50, kHalf = 21;
  Inputs inputs(41);
  std::vector<float> inv_freq(kHalf);
  for (size_t i = 0; i < inv_freq.size(); ++i)
    inv_freq[i] = i == 0 ? 1.0f : inv_freq[i - 1] * 0.625f;
  std::vector<int32_t> positions(kRows);
  for (size_t t = 0; t < positions.size(); ++t)
    positions[t] = t < 8 ? int32_t(t) : inputs.below(1 << 20);
  std::vector<float> cos(kRows * kHalf), sin(kRows * kHalf);
  rope_table(inv_freq.data(), positions.data(), 1.25f, cos.data(), sin.data(), kRows, kHalf);
  Hash hash;
  hash.add(cos);
  hash.add(sin);
  digests.push_back({"rope_table", "f32", hash.value()});
  std::vector<float> x = inputs.values(kRows * kHeads * kDim);
  rope(x.data(), cos.data(), sin.data(), kRows, kHeads, kDim, kHalf);
  digests.push_back({"rope", "f32", hash_of(x)});
}

void digest_route(std::vector<OpDigest>& digests) {
  constexpr int kRows = 16, kExperts = 61, kPicked = 8;
  Inputs inputs(42);
  std::vector<float> logits = inputs.values(kRows * kExperts);
  logits[7] = logits[3] = logits[50] = 4.0f;  // a tie at the top
  std::vector<int32_t> experts(kRows * kPicked);
  std::vector<float> weights(kRows * kPicked);
  for (const bool renormalise : {false, true}) {
    route_softmax(logits.data(), kRows, kExperts, kPicked, renormalise, experts.data(),
                  weights.data());
    Hash hash;
    hash.add(experts);
    hash.add(weights);
    digests.push_back({renormalise ? "route_renormalised" : "route", "f32", hash.value()});
  }
}

// Keys and values of kTokens tokens of one sequence, whose blocks lie in a shuffled order.
struct Cached {
  static constexpr int64_t kTokens = 330, kBlocks = 6;
  std::vector<uint8_t> keys, values;
  std::vector<int32_t> table;
  KvCache cache;

  Cached(Inputs& inputs, bool is_half, int64_t kv_heads, int64_t dim)
      : keys(size_t(kBlocks * kv_heads * kKvBlockTokens * dim * (is_half ? 2 : 4)), 0xFF),
        values(keys),
        table{4, 1, 5, 0, 3, 2},
        cache{keys.data(), values.data(), is_half, kBlocks, kv_heads, dim} {
    const std::vector<float> k = inputs.values(kTokens * kv_heads * dim),
                             v = inputs.values(kTokens * kv_heads * dim);
    std::vector<int32_t> slots(kTokens);
    for (size_t p = 0; p < slots.size(); ++p)
      slots[p] = table[p / kKvBlockTokens] * kKvBlockTokens + int32_t(p % kKvBlockTokens);
    kv_write(cache, k.data(), v.data(), slots.data(), kTokens);
  }
};

// Rows [first, end) of the sequence in one call.
void attend(Hash& hash, Inputs& inputs, const Cached& cached, int64_t heads, int32_t first,
            int32_t end, int64_t window) {
  const int64_t rows = end - first;
  const std::vector<float> q = inputs.values(rows * heads * cached.cache.dim);
  std::vector<float> out(q.size());
  const std::vector<int32_t> sequence(size_t(rows), 0);
  std::vector<int32_t> position(size_t(rows), 0);
  for (size_t t = 0; t < position.size(); ++t) position[t] = first + int32_t(t);
  attention(cached.cache, {q.data(), out.data(), rows, heads, cached.table.data(), 1,
                           Cached::kBlocks, sequence.data(), position.data(), 0.3f, window});
  hash.add(out);
}

void digest_finish(std::vector<OpDigest>& digests) {
  constexpr int64_t kRows = 5, kDim = 33;
  Inputs inputs(45);
  std::vector<int64_t> sums;
  for (int64_t t = 0; t < kRows; ++t)
    for (int64_t i = 0; i < kDim; ++i) sums.push_back(int64_t(inputs.bits()) >> (56 - 9 * t));
  std::vector<float> out(sums.size());
  finish_sums(sums.data(), 17, out.data(), kRows * kDim);
  digests.push_back({"finish_sums", "i64", hash_of(out)});
  std::vector<uint8_t> widths(kRows);
  std::vector<uint8_t> data(size_t(sum_widths(sums.data(), kRows, kDim, widths.data())));
  pack_sums(sums.data(), kRows, kDim, widths.data(), data.data());
  Hash hash;
  hash.add(widths);
  hash.add(data);
  digests.push_back({"pack_sums", "i64", hash.value()});
  data.resize(2 * sums.size());
  pack_bf16(sums.data(), 17, data.data(), kRows * kDim);
  const int32_t target[kRows] = {0, 2, 1, 2, 0};
  unpack_add_bf16(data.data(), kRows, 17, target, sums.data(), kRows, kDim);
  Hash rounded;
  rounded.add(data);
  rounded.add(sums);
  digests.push_back({"pack_bf16", "i64", rounded.value()});
}

}  // namespace

void digest_floats(std::vector<OpDigest>& digests) {
  digest_elementwise(digests);
  digest_rope(digests);
  digest_route(digests);
  digest_finish(digests);
}

void digest_attention(std::vector<OpDigest>& digests) {
  for (const bool is_half : {false, true}) {
    Inputs inputs(43);
    const Cached grouped(inputs, is_half, 2, 20), plain(inputs, is_half, 1, 64);
    Hash written;
    written.add(grouped.keys);
    written.add(grouped.values);
    digests.push_back({"kv_write", is_half ? "f16" : "f32", written.value()});
    Hash hash;
    attend(hash, inputs, grouped, 6, 250, 262, INT64_MAX);   // many queries, two cuts
    attend(hash, inputs, grouped, 24, 329, 330, INT64_MAX);  // one row, later maxima
    attend(hash, inputs, grouped, 6, 250, 253, 70);          // few rows, a window
    attend(hash, inputs, plain, 1, 60, 68, 33);              // tiles whose rows see different keys
    attend(hash, inputs, plain, 1, 0, 3, INT64_MAX);
    digests.push_back({"attention", is_half ? "f16" : "f32", hash.value()});
  }
}

void digest_sampling(std::vector<OpDigest>& digests) {
  constexpr int64_t kVocab = 1000;
  Inputs inputs(46);
  const std::vector<float> logits = inputs.values(kVocab);
  const SampleParams plain{1.0f, 0, 1.0, 0.0, 1.0f, 0.0f, 0.0f, {}};
  SampleParams cut = plain;
  cut.temperature = 0.7f;
  cut.top_k = 100;
  cut.top_p = 0.9;
  cut.min_p = 0.01;
  cut.repetition_penalty = 1.1f;
  cut.presence_penalty = 0.25f;
  cut.frequency_penalty = 0.5f;
  cut.logit_bias = {{5, 2.5f}, {9, -1.0f}};
  const std::vector<int32_t> history = {5, 5, 9, 700, 3};
  std::vector<int32_t> tokens;
  for (uint32_t position = 0; position < 16; ++position)
    for (const SampleParams& params : {plain, cut})
      tokens.push_back(
          sample(logits.data(), kVocab, params, history, {0x123456789ABCDEFu, 1, position}));
  digests.push_back({"sample", "f32", hash_of(tokens)});
  std::vector<double> noise;
  for (int i = 0; i < 400; ++i) noise.push_back(gumbel_noise_of({uint64_t(i), 2, 3}, i));
  digests.push_back({"gumbel_noise", "f64", hash_of(noise)});
  std::vector<int32_t> ids(20);
  std::vector<float> logprobs(20);
  top_logprobs(logits.data(), kVocab, 20, ids.data(), logprobs.data());
  Hash hash;
  hash.add(ids);
  hash.add(logprobs);
  digests.push_back({"top_logprobs", "f32", hash.value()});
}

}  // namespace shoal
