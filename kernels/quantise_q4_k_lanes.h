// The Q4_K quantiser on Lanes: two super-blocks at a time, each of their 16 sub-blocks a lane.
// quantise_q4_k.cpp says what it computes and why; quantise_q4_k_<isa>.cpp include this file after
// their lanes_*.h.
//
// Only +, -, *, / and comparisons on float32, in an order that no loop can change: sums over a
// sub-block run in ascending order in its own lane.
#pragma once
#include <cstring>

#include "quantise_q4_k.h"

namespace shoal {
namespace {

constexpr int kPairs = 2, kSubs = 8, kValues = 32, kBlockBytes = 144;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to even
constexpr float kMaxHalf = 65504.0f;

#define SHOAL_EACH_SUB for (int s = 0; s < kLanes; ++s)

// One number a sub-block, lane by lane.
struct PerSub {
  float v[kLanes];
};
SHOAL_INLINE Lanes lanes_of(const PerSub& a) { return load(a.v); }

// Value k of sub-block s.
struct Values {
  float v[kValues][kLanes];
};

SHOAL_INLINE float smaller(float a, float b) { return a < b ? a : b; }
SHOAL_INLINE float larger(float a, float b) { return a > b ? a : b; }
SHOAL_INLINE float nearest(float v) { return (v + kRounder) - kRounder; }  // |v| < 2^22
SHOAL_INLINE Lanes to_quants(Lanes v) {
  v = min(v, set1(1e6f));
  v = sub(add(v, set1(kRounder)), set1(kRounder));
  return min(max(v, zero()), set1(15.0f));
}

// f16 bits of v >= 0, rounded to nearest even; at most the largest half.
uint16_t to_half(float v) {
  float lanes[kLanes] = {smaller(v, kMaxHalf)};
  uint16_t halves[kLanes];
  store_half(halves, load(lanes));
  return halves[0];
}
float from_half(uint16_t h) {
  const uint16_t halves[kLanes] = {h};
  float lanes[kLanes];
  store(lanes, load_half(halves));
  return lanes[0];
}

// Sub-block s is approximated by scale * q - min, min >= 0.
struct Fit {
  PerSub scale, min, error;
};

// Squared error of q = round((x + min) / scale), clamped.  Where scale is 0, q does not matter.
void error_of(const Values& x, const PerSub& scale, const PerSub& min, PerSub* error) {
  const Lanes step = lanes_of(scale), offset = lanes_of(min), inverse = div(set1(1.0f), step);
  Lanes sum = zero();
  for (int k = 0; k < kValues; ++k) {
    const Lanes shifted = add(load(x.v[k]), offset);
    const Lanes difference = sub(shifted, mul(step, to_quants(mul(shifted, inverse))));
    sum = add(sum, mul(difference, difference));
  }
  store(error->v, sum);
}

// Least-squares scale and minimum for the quants that step size 1 / inverse gives.
void fit_step(const Values& x, const PerSub& low, const PerSub& inverse, const PerSub& sum_x,
              Fit* fit) {
  PerSub sum_q, sum_qq, sum_qx;
  Lanes q1 = zero(), q2 = zero(), qx = zero();
  for (int k = 0; k < kValues; ++k) {
    const Lanes value = load(x.v[k]);
    const Lanes q = to_quants(mul(sub(value, lanes_of(low)), lanes_of(inverse)));
    q1 = add(q1, q);
    q2 = add(q2, mul(q, q));
    qx = add(qx, mul(q, value));
  }
  store(sum_q.v, q1);
  store(sum_qq.v, q2);
  store(sum_qx.v, qx);
  SHOAL_EACH_SUB {
    const float n = float(kValues), q = sum_q.v[s], qq = sum_qq.v[s];
    const float determinant = n * qq - q * q;
    const float safe = determinant > 0.0f ? determinant : 1.0f;
    float scale = (n * sum_qx.v[s] - sum_x.v[s] * q) / safe;
    float offset = (qq * sum_x.v[s] - q * sum_qx.v[s]) / safe;
    const float scale_alone = sum_qx.v[s] / (qq > 0.0f ? qq : 1.0f);
    scale = offset > 0.0f ? scale_alone : scale;  // the minimum cannot lift values
    offset = offset > 0.0f ? 0.0f : offset;
    const bool usable = determinant > 0.0f && scale > 0.0f;
    fit->scale.v[s] = usable ? scale : 0.0f;
    fit->min.v[s] = usable ? 0.0f - offset : 0.0f;
  }
}

// Step 1: each sub-block alone.
void fit_alone(const Values& x, Fit* best) {
  PerSub low, high, sum_x;
  Lanes least = zero(), most = load(x.v[0]), sum = zero();
  for (int k = 0; k < kValues; ++k) {
    const Lanes value = load(x.v[k]);
    least = min(least, value);
    most = max(most, value);
    sum = add(sum, value);
  }
  store(low.v, least);
  store(high.v, most);
  store(sum_x.v, sum);
  SHOAL_EACH_SUB best->scale.v[s] = (high.v[s] - low.v[s]) / 15.0f;
  SHOAL_EACH_SUB best->min.v[s] = 0.0f - low.v[s];
  error_of(x, best->scale, best->min, &best->error);
  for (int step = 0; step <= 20; ++step) {
    const float levels = 14.0f + 0.1f * float(step);
    Fit fit;
    PerSub inverse;
    SHOAL_EACH_SUB {
      const float range = high.v[s] - low.v[s];
      inverse.v[s] = range > 0.0f ? levels / range : 0.0f;
    }
    fit_step(x, low, inverse, sum_x, &fit);
    error_of(x, fit.scale, fit.min, &fit.error);
    SHOAL_EACH_SUB {
      const bool better = fit.scale.v[s] > 0.0f && fit.error.v[s] < best->error.v[s];
      best->scale.v[s] = better ? fit.scale.v[s] : best->scale.v[s];
      best->min.v[s] = better ? fit.min.v[s] : best->min.v[s];
      best->error.v[s] = better ? fit.error.v[s] : best->error.v[s];
    }
  }
}

// Both super-blocks: what is stored, and its error.
struct Blocks {
  PerSub d, dmin;     // values of halves, one a super-block, repeated in its lanes
  PerSub scale, min;  // integers 0..63
  PerSub error;
};

// Sum over super-block h, in one order.
float total(const PerSub& a, int h) {
  const float* v = a.v + h * kSubs;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
float largest(const PerSub& a, int h) {
  float m = a.v[h * kSubs];
  for (int s = 1; s < kSubs; ++s) m = larger(m, a.v[h * kSubs + s]);
  return m;
}
void put_both(float d, float dmin, int h, Blocks* blocks) {
  for (int s = 0; s < kSubs; ++s) {
    blocks->d.v[h * kSubs + s] = d;
    blocks->dmin.v[h * kSubs + s] = dmin;
  }
}

SHOAL_INLINE float to_six_bits(float v) {
  return smaller(larger(nearest(smaller(v, 1e6f)), 0.0f), 63.0f);
}

// For blocks->d and dmin, the best 6-bit integers within one of each sub-block's own fit.
void choose_integers(const Values& x, const Fit& fit, Blocks* blocks) {
  PerSub scale_fit, min_fit;
  SHOAL_EACH_SUB {
    const float d_inverse = blocks->d.v[s] > 0.0f ? 1.0f / blocks->d.v[s] : 0.0f;
    const float dmin_inverse = blocks->dmin.v[s] > 0.0f ? 1.0f / blocks->dmin.v[s] : 0.0f;
    scale_fit.v[s] = nearest(smaller(fit.scale.v[s] * d_inverse, 1e6f));
    min_fit.v[s] = nearest(smaller(fit.min.v[s] * dmin_inverse, 1e6f));
  }
  for (int candidate = 0; candidate < 9; ++candidate) {
    // 0, -1, +1: the rounded pair comes first and wins ties.
    const float steps[3] = {0.0f, -1.0f, 1.0f};
    const float scale_step = steps[candidate / 3], min_step = steps[candidate % 3];
    PerSub scale_bits, min_bits, scale, min, error;
    SHOAL_EACH_SUB {
      scale_bits.v[s] = to_six_bits(scale_fit.v[s] + scale_step);
      min_bits.v[s] = to_six_bits(min_fit.v[s] + min_step);
      scale.v[s] = blocks->d.v[s] * scale_bits.v[s];
      min.v[s] = blocks->dmin.v[s] * min_bits.v[s];
    }
    error_of(x, scale, min, &error);
    SHOAL_EACH_SUB {
      const bool better = candidate == 0 || error.v[s] < blocks->error.v[s];
      blocks->scale.v[s] = better ? scale_bits.v[s] : blocks->scale.v[s];
      blocks->min.v[s] = better ? min_bits.v[s] : blocks->min.v[s];
      blocks->error.v[s] = better ? error.v[s] : blocks->error.v[s];
    }
  }
}

// The quants of every value for what is stored.
void quants_of(const Values& x, const Blocks& b, Values* quants) {
  PerSub inverse, offset;
  SHOAL_EACH_SUB {
    const float scale = b.d.v[s] * b.scale.v[s];
    inverse.v[s] = scale > 0.0f ? 1.0f / scale : 0.0f;
    offset.v[s] = b.dmin.v[s] * b.min.v[s];
  }
  for (int k = 0; k < kValues; ++k)
    store(quants->v[k], to_quants(mul(add(load(x.v[k]), lanes_of(offset)), lanes_of(inverse))));
}

// Step 3: least squares of x = d * (scale * q) - dmin * min over a super-block, then new integers.
void refine(const Values& x, const Fit& fit, const Blocks& from, Blocks* to) {
  Values quants;
  quants_of(x, from, &quants);
  const Lanes scale = lanes_of(from.scale), b = sub(zero(), lanes_of(from.min));
  Lanes aa = zero(), ab = zero(), bb = zero(), ax = zero(), bx = zero();
  for (int k = 0; k < kValues; ++k) {
    const Lanes a = mul(scale, load(quants.v[k])), value = load(x.v[k]);
    aa = add(aa, mul(a, a));
    ab = add(ab, mul(a, b));
    bb = add(bb, mul(b, b));
    ax = add(ax, mul(a, value));
    bx = add(bx, mul(b, value));
  }
  PerSub sums[5];
  store(sums[0].v, aa);
  store(sums[1].v, ab);
  store(sums[2].v, bb);
  store(sums[3].v, ax);
  store(sums[4].v, bx);
  for (int h = 0; h < kPairs; ++h) {
    const float saa = total(sums[0], h), sab = total(sums[1], h), sbb = total(sums[2], h);
    const float sax = total(sums[3], h), sbx = total(sums[4], h);
    const float determinant = saa * sbb - sab * sab;
    const float old_d = from.d.v[h * kSubs], old_dmin = from.dmin.v[h * kSubs];
    float d = saa > 0.0f ? sax / saa : 0.0f, dmin = old_dmin;
    if (determinant > 0.0f) {
      d = (sbb * sax - sab * sbx) / determinant;
      dmin = (saa * sbx - sab * sax) / determinant;
    }
    const bool usable = d > 0.0f && dmin >= 0.0f;
    put_both(usable ? from_half(to_half(d)) : old_d, usable ? from_half(to_half(dmin)) : old_dmin,
             h, to);
  }
  choose_integers(x, fit, to);
}

void copy_block(const Blocks& from, int h, Blocks* to) {
  for (int s = h * kSubs; s < (h + 1) * kSubs; ++s) {
    to->d.v[s] = from.d.v[s];
    to->dmin.v[s] = from.dmin.v[s];
    to->scale.v[s] = from.scale.v[s];
    to->min.v[s] = from.min.v[s];
    to->error.v[s] = from.error.v[s];
  }
}

void write_block(const Values& quants, const Blocks& b, int h, uint8_t* out) {
  const int first = h * kSubs;
  const uint16_t d = to_half(b.d.v[first]), dmin = to_half(b.dmin.v[first]);
  std::memset(out, 0, kBlockBytes);
  std::memcpy(out, &d, 2);
  std::memcpy(out + 2, &dmin, 2);
  uint8_t* packed = out + 4;
  for (int s = 0; s < kSubs; ++s) {
    const unsigned scale = unsigned(b.scale.v[first + s]), min = unsigned(b.min.v[first + s]);
    if (s < 4) {
      packed[s] |= uint8_t(scale);
      packed[s + 4] |= uint8_t(min);
    } else {
      packed[s + 4] = uint8_t((scale & 15) | (min & 15) << 4);
      packed[s - 4] |= uint8_t(scale >> 4 << 6);
      packed[s] |= uint8_t(min >> 4 << 6);
    }
  }
  for (int s = 0; s < kSubs; ++s)
    for (int k = 0; k < kValues; ++k)
      out[16 + s / 2 * kValues + k] |= uint8_t(unsigned(quants.v[k][first + s]) << (s % 2 * 4));
}

// count (1 or 2) super-blocks of 256 values -> count blocks of 144 bytes.
void quantise_pair(const float* values, int count, uint8_t* out) {
  Values x;
  for (int s = 0; s < kLanes; ++s)
    for (int k = 0; k < kValues; ++k)
      x.v[k][s] = s < count * kSubs ? values[s * kValues + k] : 0.0f;
  Fit fit;
  fit_alone(x, &fit);
  Blocks best, next;
  for (int h = 0; h < kPairs; ++h)
    put_both(from_half(to_half(largest(fit.scale, h) / 63.0f)),
             from_half(to_half(largest(fit.min, h) / 63.0f)), h, &best);
  choose_integers(x, fit, &best);
  bool improving[kPairs] = {true, true};
  for (int round = 0; round < 2; ++round) {
    refine(x, fit, best, &next);
    for (int h = 0; h < kPairs; ++h) {
      improving[h] = improving[h] && total(next.error, h) < total(best.error, h);
      if (improving[h]) copy_block(next, h, &best);
    }
  }
  Values quants;
  quants_of(x, best, &quants);
  for (int h = 0; h < count; ++h) write_block(quants, best, h, out + h * kBlockBytes);
}

}  // namespace
}  // namespace shoal
