// Constants and small macros of the exactness contract that every instruction set shares.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__FAST_MATH__)
#error "the exactness contract does not hold with -ffast-math"
#endif

#define SHOAL_INLINE static inline __attribute__((always_inline, unused))

namespace shoal {

constexpr int kLanes = 16;  // output rows in a row group; partial sums of a reduction

// exp(x):
//   x clamped to [-87, 88];  n = x * log2(e) rounded to an integer by fma with 1.5 * 2^23 and a
//   subtraction;  f = x * log2(e) - n (two fma);  2^f by a degree-6 polynomial (six fma);
//   times 2^n built by shifting n + 127 into the exponent.  Worst relative error 2.3e-7 (measured).
struct Exp {
  static constexpr float lowest = -87.0f, highest = 88.0f;
  static constexpr float log2e_hi = 1.44269502f, log2e_lo = 1.92596299e-8f;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
  static constexpr float c6 = 1.54035303e-4f, c5 = 1.33335581e-3f, c4 = 9.61812911e-3f,
                         c3 = 5.55041087e-2f, c2 = 2.40226507e-1f, c1 = 6.93147181e-1f, c0 = 1.0f;
};

}  // namespace shoal
