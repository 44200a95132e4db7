// Sixteen float32 lanes in portable C++: the meaning of every operation in lanes_avx2.h and
// lanes_avx512.h, and the path of machines that have neither.
//
// Every function is one IEEE-754 operation per lane (or a fixed sequence of them), so code written
// against this interface gives the same bits on every instruction set.  All of it lives in an
// anonymous namespace: a kernel file includes exactly one lanes_*.h, and nothing leaks out of it.
#pragma once
#include <cstdint>
#include <cstring>

#include "exact_constants.h"

namespace shoal {
namespace {

struct Lanes {
  float v[16];
};

#define SHOAL_EACH_LANE for (int i = 0; i < 16; ++i)

SHOAL_INLINE Lanes set1(float x) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = x;
  return r;
}
SHOAL_INLINE Lanes zero() { return set1(0.0f); }
SHOAL_INLINE Lanes load(const float* p) {
  Lanes r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
SHOAL_INLINE void store(float* p, const Lanes& a) { std::memcpy(p, a.v, sizeof a.v); }

// The first n lanes (0 <= n <= 16) from memory, the rest zero; nothing is read past p + n.
SHOAL_INLINE Lanes load_first(const float* p, int n) {
  Lanes r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = p[i];
  return r;
}
SHOAL_INLINE void store_first(float* p, const Lanes& a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

SHOAL_INLINE Lanes add(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] + b.v[i];
  return r;
}
SHOAL_INLINE Lanes sub(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] - b.v[i];
  return r;
}
SHOAL_INLINE Lanes mul(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] * b.v[i];
  return r;
}
SHOAL_INLINE Lanes div(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] / b.v[i];
  return r;
}
// a * b + c, rounded once.
SHOAL_INLINE Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
// a * b - c, rounded once.
SHOAL_INLINE Lanes fms(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = __builtin_fmaf(a.v[i], b.v[i], -c.v[i]);
  return r;
}
// a > b ? a : b, operand for operand like maxps (a NaN in a gives b).
SHOAL_INLINE Lanes max(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return r;
}
SHOAL_INLINE Lanes min(const Lanes& a, const Lanes& b) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return r;
}
// value where a > b, else 0.
SHOAL_INLINE Lanes where_greater(const Lanes& a, const Lanes& b, const Lanes& value) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = a.v[i] > b.v[i] ? value.v[i] : 0.0f;
  return r;
}
SHOAL_INLINE Lanes abs(const Lanes& a) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = __builtin_fabsf(a.v[i]);
  return r;
}
// Lanes in [low, high) keep their value, the others become `other`.
SHOAL_INLINE Lanes keep_range(const Lanes& a, int low, int high, float other) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = i >= low && i < high ? a.v[i] : other;
  return r;
}

// Sum of the lanes, folded 8-4-2-1: lane i + lane i+8, then +4, +2, +1 (exactness rule 2).
SHOAL_INLINE float fold_sum(const Lanes& a) {
  float r[8];
  for (int i = 0; i < 8; ++i) r[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) r[i] = r[i] + r[i + 4];
  for (int i = 0; i < 2; ++i) r[i] = r[i] + r[i + 2];
  return r[0] + r[1];
}
// Largest lane; lanes must not be NaN.
SHOAL_INLINE float fold_max(const Lanes& a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}

// f16 -> f32 is exact, subnormals too.
SHOAL_INLINE float widen_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {
    const float v = float(fraction) * 0x1p-24f;
    return sign ? -v : v;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
// f32 -> f16, round to nearest even; too large becomes infinity, like vcvtps2ph.
SHOAL_INLINE uint16_t narrow_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00 | (magnitude >> 13 & 0x1FF));
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // >= 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: a subnormal half is a multiple of 2^-24
    float m;
    std::memcpy(&m, &magnitude, 4);
    const float shifted = m + 0.5f;  // 0.5 has an ulp of 2^-24: the addition rounds to even
    uint32_t out;
    std::memcpy(&out, &shifted, 4);
    return uint16_t(sign | (out - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}
SHOAL_INLINE Lanes load_half(const uint16_t* p) {
  Lanes r;
  SHOAL_EACH_LANE r.v[i] = widen_half(p[i]);
  return r;
}
SHOAL_INLINE void store_half(uint16_t* p, const Lanes& a) {
  SHOAL_EACH_LANE p[i] = narrow_half(a.v[i]);
}
SHOAL_INLINE Lanes load_bf16(const uint16_t* p) {
  Lanes r;
  SHOAL_EACH_LANE {
    const uint32_t bits = uint32_t(p[i]) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}

// exp(x): x clamped to [-87, 88]; steps and constants in exact_constants.h.
SHOAL_INLINE Lanes exp(const Lanes& a) {
  Lanes r;
  SHOAL_EACH_LANE {
    float x = a.v[i] < Exp::highest ? a.v[i] : Exp::highest;
    x = x > Exp::lowest ? x : Exp::lowest;
    const float n = __builtin_fmaf(x, Exp::log2e_hi, Exp::rounder) - Exp::rounder;
    float f = __builtin_fmaf(x, Exp::log2e_hi, -n);
    f = __builtin_fmaf(x, Exp::log2e_lo, f);
    float p = __builtin_fmaf(Exp::c6, f, Exp::c5);
    p = __builtin_fmaf(p, f, Exp::c4);
    p = __builtin_fmaf(p, f, Exp::c3);
    p = __builtin_fmaf(p, f, Exp::c2);
    p = __builtin_fmaf(p, f, Exp::c1);
    p = __builtin_fmaf(p, f, Exp::c0);
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    r.v[i] = p * power;
  }
  return r;
}

#undef SHOAL_EACH_LANE

}  // namespace
}  // namespace shoal
