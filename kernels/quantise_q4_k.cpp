// Q4_K: value = d * scale * q - dmin * min, with q in 0..15, 6-bit scale and min a sub-block of 32,
// f16 d and dmin a super-block of 256.
//
// Minimises the squared error of the weights, which is the expected error of an output when the
// activations are alike.  Three steps:
//   1. for each sub-block alone: 21 candidate step sizes, each with the least-squares scale and
//      minimum of the quants it gives (the search of llama.cpp's make_qkx2_quants);
//   2. d and dmin from the largest; for each sub-block the best of 9 pairs of 6-bit integers;
//   3. twice: d and dmin by least squares for those integers, then step 2's search again; kept if
//      the super-block's error fell.  (llama.cpp stops after rounding in step 2.)
//
// The result is part of an artifact's identity, so it must be the same on every CPU: only +, -, *,
// / and comparisons on float32, in an order that no loop can change: each of the 8 sub-blocks is a
// vector lane, and sums over a sub-block run in ascending order.
#include "quantise_q4_k.h"

#include <cstring>

#include "lanes_scalar.h"
#include "thread_pool.h"

namespace shoal {

namespace {

constexpr int kSubs = 8, kValues = 32, kBytes = 144;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to even
constexpr float kMaxHalf = 65504.0f;

#define SHOAL_EACH_SUB for (int s = 0; s < kSubs; ++s)

struct PerSub {
  float v[kSubs];
};

struct Values {
  float v[kValues][kSubs];  // value k of sub-block s
};

SHOAL_INLINE float smaller(float a, float b) { return a < b ? a : b; }
SHOAL_INLINE float larger(float a, float b) { return a > b ? a : b; }
SHOAL_INLINE float nearest(float v) { return (v + kRounder) - kRounder; }  // |v| < 2^22
SHOAL_INLINE float to_quant(float v) {
  return smaller(larger(nearest(smaller(v, 1e6f)), 0.0f), 15.0f);
}

// What a half holds of v >= 0: at most its largest number.
float as_half(float v) { return widen_half(narrow_half(v < kMaxHalf ? v : kMaxHalf)); }

// Sub-block s is approximated by scale * q - min, min >= 0.
struct Fit {
  PerSub scale, min, error;
};

// Squared error of q = round((x + min) / scale), clamped.
PerSub error_of(const Values& x, const PerSub& scale, const PerSub& min) {
  PerSub inverse, error;
  SHOAL_EACH_SUB inverse.v[s] = scale.v[s] > 0.0f ? 1.0f / scale.v[s] : 0.0f;
  SHOAL_EACH_SUB error.v[s] = 0.0f;
  for (int k = 0; k < kValues; ++k) {
    SHOAL_EACH_SUB {
      const float shifted = x.v[k][s] + min.v[s];
      const float difference = shifted - scale.v[s] * to_quant(shifted * inverse.v[s]);
      error.v[s] = error.v[s] + difference * difference;
    }
  }
  return error;
}

// Least-squares scale and minimum for the quants that step size 1 / inverse gives.
void fit_step(const Values& x, const PerSub& low, const PerSub& inverse, const PerSub& sum_x,
              Fit* fit) {
  PerSub sum_q{}, sum_qq{}, sum_qx{};
  for (int k = 0; k < kValues; ++k) {
    SHOAL_EACH_SUB {
      const float q = to_quant((x.v[k][s] - low.v[s]) * inverse.v[s]);
      sum_q.v[s] = sum_q.v[s] + q;
      sum_qq.v[s] = sum_qq.v[s] + q * q;
      sum_qx.v[s] = sum_qx.v[s] + q * x.v[k][s];
    }
  }
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

// Step 1.
Fit fit_alone(const Values& x) {
  PerSub low{}, high, sum_x{};
  SHOAL_EACH_SUB high.v[s] = x.v[0][s];
  for (int k = 0; k < kValues; ++k) {
    SHOAL_EACH_SUB low.v[s] = smaller(low.v[s], x.v[k][s]);
    SHOAL_EACH_SUB high.v[s] = larger(high.v[s], x.v[k][s]);
    SHOAL_EACH_SUB sum_x.v[s] = sum_x.v[s] + x.v[k][s];
  }
  Fit best;
  SHOAL_EACH_SUB best.scale.v[s] = (high.v[s] - low.v[s]) / 15.0f;
  SHOAL_EACH_SUB best.min.v[s] = 0.0f - low.v[s];
  best.error = error_of(x, best.scale, best.min);
  for (int step = 0; step <= 20; ++step) {
    const float levels = 14.0f + 0.1f * float(step);
    Fit fit;
    PerSub inverse;
    SHOAL_EACH_SUB {
      const float range = high.v[s] - low.v[s];
      inverse.v[s] = range > 0.0f ? levels / range : 0.0f;
    }
    fit_step(x, low, inverse, sum_x, &fit);
    fit.error = error_of(x, fit.scale, fit.min);
    SHOAL_EACH_SUB {
      if (fit.scale.v[s] > 0.0f && fit.error.v[s] < best.error.v[s]) {
        best.scale.v[s] = fit.scale.v[s];
        best.min.v[s] = fit.min.v[s];
        best.error.v[s] = fit.error.v[s];
      }
    }
  }
  return best;
}

// A super-block: what is stored, and its error.
struct Block {
  float d, dmin;      // representable as halves
  PerSub scale, min;  // integers 0..63
  PerSub error;
};

float total(const PerSub& a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
float largest(const PerSub& a) {
  float m = a.v[0];
  for (int s = 1; s < kSubs; ++s) m = larger(m, a.v[s]);
  return m;
}

SHOAL_INLINE float to_six_bits(float v) {
  return smaller(larger(nearest(smaller(v, 1e6f)), 0.0f), 63.0f);
}

// For given d and dmin, the best 6-bit integers within one of each sub-block's own fit.
Block choose_integers(const Values& x, const Fit& fit, float d, float dmin) {
  Block best{d, dmin, {}, {}, {}};
  const float d_inverse = d > 0.0f ? 1.0f / d : 0.0f;
  const float dmin_inverse = dmin > 0.0f ? 1.0f / dmin : 0.0f;
  for (int candidate = 0; candidate < 9; ++candidate) {
    // 0, -1, +1: the rounded pair comes first and wins ties.
    const float steps[3] = {0.0f, -1.0f, 1.0f};
    const float scale_step = steps[candidate / 3], min_step = steps[candidate % 3];
    PerSub scale_bits, min_bits, scale, min;
    SHOAL_EACH_SUB {
      scale_bits.v[s] =
          to_six_bits(nearest(smaller(fit.scale.v[s] * d_inverse, 1e6f)) + scale_step);
      min_bits.v[s] = to_six_bits(nearest(smaller(fit.min.v[s] * dmin_inverse, 1e6f)) + min_step);
      scale.v[s] = d * scale_bits.v[s];
      min.v[s] = dmin * min_bits.v[s];
    }
    const PerSub error = error_of(x, scale, min);
    SHOAL_EACH_SUB {
      if (candidate == 0 || error.v[s] < best.error.v[s]) {
        best.scale.v[s] = scale_bits.v[s];
        best.min.v[s] = min_bits.v[s];
        best.error.v[s] = error.v[s];
      }
    }
  }
  return best;
}

float quant_of(const Block& b, float x, int s) {
  const float scale = b.d * b.scale.v[s];
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  return to_quant((x + b.dmin * b.min.v[s]) * inverse);
}

// Step 3: least squares of x = d * (scale * q) - dmin * min over the super-block, then new
// integers.
Block refine(const Values& x, const Fit& fit, const Block& block) {
  PerSub aa{}, ab{}, bb{}, ax{}, bx{};
  for (int k = 0; k < kValues; ++k) {
    SHOAL_EACH_SUB {
      const float a = block.scale.v[s] * quant_of(block, x.v[k][s], s), b = 0.0f - block.min.v[s];
      aa.v[s] = aa.v[s] + a * a;
      ab.v[s] = ab.v[s] + a * b;
      bb.v[s] = bb.v[s] + b * b;
      ax.v[s] = ax.v[s] + a * x.v[k][s];
      bx.v[s] = bx.v[s] + b * x.v[k][s];
    }
  }
  const float saa = total(aa), sab = total(ab), sbb = total(bb), sax = total(ax), sbx = total(bx);
  const float determinant = saa * sbb - sab * sab;
  float d = saa > 0.0f ? sax / saa : 0.0f, dmin = block.dmin;
  if (determinant > 0.0f) {
    d = (sbb * sax - sab * sbx) / determinant;
    dmin = (saa * sbx - sab * sax) / determinant;
  }
  if (!(d > 0.0f) || !(dmin >= 0.0f)) return block;
  return choose_integers(x, fit, as_half(d), as_half(dmin));
}

void write_block(const Values& x, const Block& b, uint8_t* out) {
  const uint16_t d = narrow_half(b.d), dmin = narrow_half(b.dmin);
  std::memset(out, 0, kBytes);
  std::memcpy(out, &d, 2);
  std::memcpy(out + 2, &dmin, 2);
  uint8_t* packed = out + 4;
  SHOAL_EACH_SUB {
    const unsigned scale = unsigned(b.scale.v[s]), min = unsigned(b.min.v[s]);
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
      out[16 + s / 2 * kValues + k] |= uint8_t(unsigned(quant_of(b, x.v[k][s], s)) << (s % 2 * 4));
}

void quantise_block(const float* values, uint8_t* out) {
  Values x;
  for (int s = 0; s < kSubs; ++s)
    for (int k = 0; k < kValues; ++k) x.v[k][s] = values[s * kValues + k];
  const Fit fit = fit_alone(x);
  const float d = as_half(largest(fit.scale) / 63.0f), dmin = as_half(largest(fit.min) / 63.0f);
  Block best = choose_integers(x, fit, d, dmin);
  for (int round = 0; round < 2; ++round) {
    const Block next = refine(x, fit, best);
    if (!(total(next.error) < total(best.error))) break;
    best = next;
  }
  write_block(x, best, out);
}

}  // namespace

void quantise_q4_k(const float* values, int64_t num_rows, int cols, uint8_t* out) {
  const int64_t blocks = num_rows * (cols / 256);
  parallel_for(blocks, 16, [&](int64_t b, int64_t end, int) {
    for (; b < end; ++b) quantise_block(values + b * 256, out + b * kBytes);
  });
}

}  // namespace shoal
