// Quantisation of activation rows in portable C++: the definition of its result.
#include <cstring>

#include "quantise.h"

namespace shoal {
namespace {

// rne(v) for |v| <= 2^31: adding 1.5 * 2^52 leaves the integer in the low mantissa bits.  In
// double, so that no compiler can contract the caller's product with the addition.
int32_t nearest(float v) {
  const double shifted = double(v) + 0x1.8p52;
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  return int32_t(bits - 0x4338000000000000);
}

// Largest magnitude as the bits of a float, which order like the numbers; >= 0x7F800000 for a NaN
// or an infinity.
uint32_t max_bits(const float* x, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    bits &= 0x7FFFFFFF;
    most = most > bits ? most : bits;
  }
  return most;
}

void put_sum(Scheme scheme, const Tile& tile, int64_t block, int n, int slot, int sum, int factor) {
  if (scheme == Scheme::int8_256) {
    if (tile.sums != nullptr) tile.sums[(block / 8 * n + slot) * 8 + block % 8] = int16_t(sum);
  } else if (tile.start != nullptr) {
    tile.start[block * n + slot] = factor * sum;
  }
}

// `count` values, the rest of the span zero.
bool quantise_span(Scheme scheme, const float* x, int count, int64_t index, const Tile& tile, int n,
                   int slot, int factor) {
  const int blocks = span_of(scheme) / kBlock;
  const uint32_t most = max_bits(x, count);
  const bool finite = most < 0x7F800000;
  float m;
  std::memcpy(&m, &most, 4);
  const bool zero = !finite || m < kTinyBlock;
  const float inverse = zero ? 0.0f : 127.0f / m;
  tile.scales[index * n + slot] = zero ? 0.0f : m / 127.0f;
  for (int b = 0; b < blocks; ++b) {
    const int64_t block = index * blocks + b;
    int8_t* quants = tile.quants + (block * n + slot) * kBlock;
    int sum = 0;
    for (int i = 0; i < kBlock; ++i) {
      const int at = b * kBlock + i;
      const int q = zero || at >= count ? 0 : nearest(x[at] * inverse);
      quants[i] = int8_t(q);
      sum += q;
    }
    put_sum(scheme, tile, block, n, slot, sum, factor);
  }
  return finite;
}

bool quantise_row(Scheme scheme, const float* x, int dim, const Tile& tile, int n, int slot,
                  int factor) {
  const int span = span_of(scheme);
  bool finite = true;
  for (int first = 0; first < dim; first += span) {
    const int count = dim - first < span ? dim - first : span;
    finite &= quantise_span(scheme, x + first, count, first / span, tile, n, slot, factor);
  }
  return finite;
}

void fill_row(Scheme scheme, const int8_t* quants, const float* scales, int padded,
              const Tile& tile, int n, int slot, int factor) {
  const int span = span_of(scheme);
  for (int s = 0; s < padded / span; ++s) tile.scales[int64_t(s) * n + slot] = scales[s];
  for (int64_t block = 0; block < padded / kBlock; ++block) {
    int8_t* to = tile.quants + (block * n + slot) * kBlock;
    int sum = 0;
    for (int i = 0; i < kBlock; ++i) sum += to[i] = quants[block * kBlock + i];
    put_sum(scheme, tile, block, n, slot, sum, factor);
  }
}

}  // namespace

const QuantiseKernels kQuantiseScalar = {quantise_row, fill_row};

}  // namespace shoal
