// The table quantiser on Lanes: sixteen blocks at a time, a block a lane.  quantise_table.cpp says
// what it computes and why; quantise_table_<isa>.cpp include this file after their lanes_*.h.
//
// Only +, -, *, / and comparisons on float32; sums over a block ascend in its own lane.
#pragma once
#include "quantise_table.h"

namespace shoal {
namespace {

constexpr int kCandidates = 7;  // scales tried of either sign
// The largest |value| becomes this part of the largest |level|, from the first to the last.
constexpr float kFirstPart = 0.65f, kPartStep = 0.075f;
constexpr float kTinyBlockMax = 0x1p-40f;  // below: zeros, as the scale is zero in float16 anyway
constexpr float kMaxScale = 65504.0f;

struct Columns {  // number k of block i
  float v[kBlock][kLanes];
};

// The levels nearest to x / scale, and their codes if asked for.
template <bool WithCodes>
SHOAL_INLINE Lanes nearest_level(const LevelTable& table, Lanes ratio, Lanes* code) {
  Lanes level = set1(table.level[0]);
  if (WithCodes) *code = zero();
  for (int i = 1; i < table.count; ++i) {
    const Lanes middle = set1((table.level[i - 1] + table.level[i]) * 0.5f);
    const Lanes rise = set1(table.level[i] - table.level[i - 1]);
    level = add(level, where_greater(ratio, middle, rise));
    if (WithCodes) *code = add(*code, where_greater(ratio, middle, set1(1.0f)));
  }
  return level;
}

// Where divisor is 0 or too small to divide by: 0.
SHOAL_INLINE Lanes quotient(Lanes value, Lanes divisor) {
  const Lanes usable = where_greater(abs(divisor), set1(0x1p-100f), set1(1.0f));
  const Lanes safe = add(divisor, sub(set1(1.0f), usable));
  return mul(usable, div(value, safe));
}

struct Sums {
  Lanes level_value, level_level;  // over a block, weighted
};
SHOAL_INLINE Sums sums_at(const LevelTable& table, const Columns& x, const Columns& weights,
                          Lanes scale) {
  const Lanes inverse = quotient(set1(1.0f), scale);
  Sums sums{zero(), zero()};
  for (int k = 0; k < kBlock; ++k) {
    const Lanes value = load(x.v[k]);
    const Lanes level = nearest_level<false>(table, mul(value, inverse), nullptr);
    const Lanes weighted = mul(load(weights.v[k]), level);
    sums.level_value = add(sums.level_value, mul(weighted, value));
    sums.level_level = add(sums.level_level, mul(weighted, level));
  }
  return sums;
}

// Least squares leaves sum(value^2) - gain of a block's error; the largest gain is the best scale.
Lanes best_scale(const LevelTable& table, const Columns& x, const Columns& weights) {
  Lanes largest = zero();
  for (int k = 0; k < kBlock; ++k) largest = max(largest, abs(load(x.v[k])));
  largest = where_greater(largest, set1(kTinyBlockMax), largest);
  float top = table.level[table.count - 1];
  if (-table.level[0] > top) top = -table.level[0];
  Lanes scale = zero(), best_gain = zero();
  for (int sign = 1; sign >= -1; sign -= 2)
    for (int i = 0; i < kCandidates; ++i) {
      const float part = (kFirstPart + kPartStep * float(i)) / top * float(sign);
      const Sums sums = sums_at(table, x, weights, mul(largest, set1(part)));
      const Lanes fitted = quotient(sums.level_value, sums.level_level);
      const Lanes gain = mul(fitted, sums.level_value);
      const Lanes keep = where_greater(gain, best_gain, set1(1.0f));
      scale = add(mul(keep, fitted), mul(sub(set1(1.0f), keep), scale));
      best_gain = max(gain, best_gain);
    }
  return scale;
}

void quantise_blocks(const LevelTable& table, const float* values, const float* importance,
                     int first, int blocks_of_row, int count, uint16_t* scales, uint8_t* codes) {
  Columns x, weights;
  for (int i = 0; i < kLanes; ++i) {
    const float* from = values + i * kBlock;
    const float* weigh = importance + (first + i) % blocks_of_row * kBlock;
    for (int k = 0; k < kBlock; ++k) {
      x.v[k][i] = i < count ? from[k] : 0.0f;
      weights.v[k][i] = importance == nullptr ? 1.0f : weigh[k];
    }
  }
  Lanes scale = best_scale(table, x, weights);
  for (int round = 0; round < 2; ++round) {  // the levels for it, and the best scale for those
    const Sums sums = sums_at(table, x, weights, scale);
    scale = quotient(sums.level_value, sums.level_level);
  }
  scale = max(min(scale, set1(kMaxScale)), set1(-kMaxScale));
  uint16_t halves[kLanes];
  store_half(halves, scale);
  const Lanes inverse = quotient(set1(1.0f), load_half(halves));
  for (int i = 0; i < count; ++i) scales[i] = halves[i];
  for (int k = 0; k < kBlock; ++k) {
    Lanes code;
    float stored[kLanes];
    nearest_level<true>(table, mul(load(x.v[k]), inverse), &code);
    store(stored, code);
    for (int i = 0; i < count; ++i) codes[i * kBlock + k] = uint8_t(int(stored[i]));
  }
}

}  // namespace
}  // namespace shoal
