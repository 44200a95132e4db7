// Natural logarithm in double by plain IEEE operations.
#pragma once
#include <cstdint>
#include <cstring>

#include "exact_constants.h"

namespace shoal {
namespace {

// x positive and normal, error below 1 ulp.  x = 2^k * m with m in [sqrt(1/2), sqrt(2));
// f = m - 1, s = f / (2 + f); log(1 + f) = f - f^2/2 + s * (f^2/2 + R(s^2)).
// Source: the algorithm and coefficients of fdlibm's e_log.c (Sun Microsystems, 1993).
SHOAL_INLINE double log_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const uint32_t high = uint32_t(bits >> 32) + (0x3FF00000 - 0x3FE6A09E);
  const double k = double(int32_t(high >> 20) - 0x3FF);
  bits = uint64_t((high & 0xFFFFF) + 0x3FE6A09E) << 32 | (bits & 0xFFFFFFFF);
  double m;
  std::memcpy(&m, &bits, 8);
  const double f = m - 1.0;
  const double half_square = 0.5 * f * f;
  const double s = f / (2.0 + f);
  const double z = s * s;
  const double w = z * z;
  const double even = w * (3.999999999940941908e-01 +
                           w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double odd = z * (6.666666666666735130e-01 +
                          w * (2.857142874366239149e-01 +
                               w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const double rest = odd + even;
  return s * (half_square + rest) + k * 1.90821492927058770002e-10 - half_square + f +
         k * 6.93147180369123816490e-01;
}

}  // namespace
}  // namespace shoal
