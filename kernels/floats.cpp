// Threads and checks of the float kernels; and what is too small to have one per instruction set.
#include "floats.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "cpu_features.h"
#include "exact_constants.h"
#include "isa_table.h"
#include "thread_pool.h"
#include "tiles.h"

static_assert(FLT_EVAL_METHOD == 0, "the exactness contract needs plain IEEE float and double");

namespace shoal {
namespace {

constexpr int64_t kValuesPerChunk = 16384;  // 64 KiB of floats: a few microseconds of work

int64_t rows_per_chunk(int64_t dim) { return std::max<int64_t>(1, kValuesPerChunk / dim); }

const FloatsTable& table() { return SHOAL_ISA_TABLE(kFloats); }

// sin and cos of |angle| <= 2^23 in double.  Plain multiplications and additions only, so that
// every compiler and CPU gives the same bits without hardware fma.
//   n = angle * 2/pi rounded to nearest;  r = angle - n * pi/2, pi/2 in three parts: 30 bits,
//   30 bits, the rest, so that n * part is exact for the first two;  then fdlibm's polynomials
//   on |r| <= pi/4, and the quadrant by n mod 4.
struct SinCos {
  double sin, cos;
};

SinCos sin_cos(double angle) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kHalfPi1 = 0x1.921fb54p+0, kHalfPi2 = 0x1.10b46118p-30,
                   kHalfPi3 = 0x1.313198a2e037p-61;
  constexpr double kRounder = 0x1.8p52;
  const double n = (angle * kTwoOverPi + kRounder) - kRounder;
  const double r = ((angle - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3;
  const double z = r * r;
  double s = 1.58969099521155010221e-10;
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = r + r * (z * s);
  double c = -1.13596475577881948265e-11;
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  c = (1.0 - 0.5 * z) + z * (z * c);
  switch (int64_t(n) & 3) {
    case 0:
      return {s, c};
    case 1:
      return {c, -s};
    case 2:
      return {-s, -c};
    default:
      return {-c, s};
  }
}

// The `count` largest of p[0..n), largest first, ties to the lower index.
void pick_largest(const float* p, int n, int count, int32_t* picked) {
  int held = 0;
  for (int e = 0; e < n; ++e) {
    if (held == count && !(p[e] > p[picked[held - 1]])) continue;
    int at = held < count ? held++ : held - 1;
    for (; at > 0 && p[e] > p[picked[at - 1]]; --at) picked[at] = picked[at - 1];
    picked[at] = e;
  }
}

// Weights of the picked experts; their sum runs in ascending expert index (exactness rule 4).
void weigh(const float* p, int count, bool renormalise, const int32_t* picked, float* weights) {
  for (int a = 0; a < count; ++a) weights[a] = p[picked[a]];
  if (!renormalise) return;
  int32_t order[kMaxExpertsPerToken];
  std::copy(picked, picked + count, order);
  std::sort(order, order + count);
  float sum = 0.0f;
  for (int a = 0; a < count; ++a) sum = sum + p[order[a]];
  for (int a = 0; a < count; ++a) weights[a] = weights[a] / sum;
}

std::vector<int32_t> marked(const std::vector<uint8_t>& flags) {
  std::vector<int32_t> rows;
  for (size_t t = 0; t < flags.size(); ++t)
    if (flags[t]) rows.push_back(int32_t(t));
  return rows;
}

}  // namespace

void rms_norm(const float* x, const float* w, float eps, float* out, int64_t rows, int64_t dim) {
  const auto kernel = table().rms_norm;
  parallel_for(rows, rows_per_chunk(dim), [&](int64_t begin, int64_t end, int) {
    kernel(x + begin * dim, w, eps, out + begin * dim, end - begin, dim);
  });
}

void add_floats(const float* a, const float* b, float* out, int64_t n) {
  const auto kernel = table().add;
  parallel_for(n, kValuesPerChunk, [&](int64_t begin, int64_t end, int) {
    kernel(a + begin, b + begin, out + begin, end - begin);
  });
}

void clamp_floats(const float* x, float limit, float* out, int64_t n) {
  const auto kernel = table().clamp;
  parallel_for(n, kValuesPerChunk, [&](int64_t begin, int64_t end, int) {
    kernel(x + begin, limit, out + begin, end - begin);
  });
}

std::vector<int32_t> rope_table(const float* inv_freq, const int32_t* positions, float factor,
                                float* cos, float* sin, int64_t rows, int64_t half) {
  std::vector<uint8_t> bad(size_t(rows), 0);
  parallel_for(rows, std::max<int64_t>(1, 512 / std::max<int64_t>(1, half)),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t t = begin; t < end; ++t)
                   for (int64_t i = 0; i < half; ++i) {
                     const float angle = float(positions[t]) * inv_freq[i];
                     if (!(__builtin_fabsf(angle) <= float(kMaxRopeAngle))) {
                       bad[size_t(t)] = 1;
                       break;
                     }
                     const SinCos v = sin_cos(double(angle));
                     cos[t * half + i] = float(v.cos) * factor;
                     sin[t * half + i] = float(v.sin) * factor;
                   }
               });
  return marked(bad);
}

void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim,
          int64_t half) {
  const auto kernel = table().rope;
  parallel_for(rows, rows_per_chunk(heads * dim), [&](int64_t begin, int64_t end, int) {
    kernel(x + begin * heads * dim, cos + begin * half, sin + begin * half, end - begin, heads, dim,
           half);
  });
}

std::vector<int32_t> route_softmax(const float* logits, int64_t rows, int num_experts,
                                   int experts_per_token, bool renormalise, int32_t* experts,
                                   float* weights) {
  const auto softmax = table().softmax;
  std::vector<uint8_t> bad(size_t(rows), 0);
  std::vector<float> probabilities(size_t(rows) * num_experts);
  parallel_for(rows, std::max(1, 4096 / num_experts), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = logits + t * num_experts;
      float* p = probabilities.data() + t * num_experts;
      int32_t* picked = experts + t * experts_per_token;
      float* chosen = weights + t * experts_per_token;
      if (!all_finite(row, num_experts)) {
        bad[size_t(t)] = 1;
        for (int a = 0; a < experts_per_token; ++a) picked[a] = a, chosen[a] = 0.0f;
        continue;
      }
      softmax(row, p, num_experts);
      pick_largest(p, num_experts, experts_per_token, picked);
      weigh(p, experts_per_token, renormalise, picked, chosen);
    }
  });
  return marked(bad);
}

}  // namespace shoal
