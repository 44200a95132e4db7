// Float work outside matrices: norms, residual adds, rope, routing.  docs/numerics.md has the exact
// sequence of operations of each; every instruction set follows it, so all give the same bits.
//
// All arrays are dense and row-major.  The functions use the thread pool, pin the float environment
// and keep no state.  A returned list holds the offending rows, ascending; the others are right.
#pragma once
#include <cstdint>
#include <vector>

namespace shoal {

constexpr int kMaxExpertsPerToken = 64;  // limits.MAX_EXPERTS_PER_TOKEN

// out[t][i] = x[t][i] * r[t] * w[i], r[t] = 1 / sqrt(mean of x[t]^2 + eps).  out may be x.
void rms_norm(const float* x, const float* w, float eps, float* out, int64_t rows, int64_t dim);

// out[i] = a[i] + b[i].  out may be a or b.
void add_floats(const float* a, const float* b, float* out, int64_t n);

// out[i] = x[i] cut to [-limit, limit].  out may be x.
void clamp_floats(const float* x, float limit, float* out, int64_t n);

// cos and sin [rows][half] of float(position) * inv_freq[i], each times `factor`.
// |angle| <= kMaxRopeAngle, else that row is returned and its table is not written.
constexpr double kMaxRopeAngle = 8388608.0;  // 2^23: the reduction is exact up to here
std::vector<int32_t> rope_table(const float* inv_freq, const int32_t* positions, float factor,
                                float* cos, float* sin, int64_t rows, int64_t half);

// Turns the first 2 * half of the `dim` values of each head of x [rows][heads][dim] in place:
// (a, b) = (x[i], x[i + half]) becomes (a cos - b sin, b cos + a sin).
void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t dim,
          int64_t half);

// Softmax over the num_experts logits of each row, then the experts_per_token largest, ties to the
// lower index, in descending order; weights divided by their sum if renormalise.  Returns the rows
// with a non-finite logit; their experts are 0, 1, ... and their weights 0.
std::vector<int32_t> route_softmax(const float* logits, int64_t rows, int num_experts,
                                   int experts_per_token, bool renormalise, int32_t* experts,
                                   float* weights);

// One implementation of the above for one instruction set, without threads.
struct FloatsTable {
  void (*rms_norm)(const float* x, const float* w, float eps, float* out, int64_t rows,
                   int64_t dim);
  void (*add)(const float* a, const float* b, float* out, int64_t n);
  void (*clamp)(const float* x, float limit, float* out, int64_t n);
  void (*rope)(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads,
               int64_t dim, int64_t half);
  // probabilities[n] of finite logits[n].
  void (*softmax)(const float* logits, float* probabilities, int64_t n);
};
extern const FloatsTable kFloatsScalar, kFloatsAvx2, kFloatsAvx512;

}  // namespace shoal
