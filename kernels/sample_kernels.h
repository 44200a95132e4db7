// The sampling kernels that touch a whole vocabulary; the rules of floats_kernels.h hold here too.
#pragma once
#include "exact_log.h"
#include "sample.h"

namespace shoal {
namespace {

void probability_masses(const float* x, float top, int64_t n, int64_t* masses) {
  constexpr double kRounder = 0x1.8p52;  // adding it rounds a double below 2^51 to an integer
  uint64_t rounder_bits;
  std::memcpy(&rounder_bits, &kRounder, 8);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = n - i < kLanes ? int(n - i) : kLanes;
    float e[kLanes];
    store(e, exp(sub(load_first(x + i, left), set1(top))));
    for (int j = 0; j < left; ++j) {
      const double shifted = double(e[j]) * 0x1p40 + kRounder;
      uint64_t bits;
      std::memcpy(&bits, &shifted, 8);
      masses[i + j] = x[i + j] == -__builtin_inff() ? 0 : int64_t(bits - rounder_bits);
    }
  }
}

// The first output word of Philox4x32-10.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
SHOAL_INLINE uint32_t philox(SampleKey key, uint32_t id) {
  uint32_t c0 = id, c1 = key.position, c2 = key.choice, c3 = 0;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

void gumbel_noise(SampleKey key, const int32_t* ids, int64_t n, double* noise) {
  for (int64_t i = 0; i < n; ++i) {
    const double u = (double(philox(key, uint32_t(ids[i]))) + 0.5) * 0x1p-32;
    noise[i] = -log_of(-log_of(u));
  }
}

constexpr SampleTable kSampleTable = {probability_masses, gumbel_noise};

}  // namespace
}  // namespace shoal
