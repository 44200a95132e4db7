// Quantisation of activation rows for AVX2.  AVX-512 CPUs use it too: it is a few percent of a
// product, and a wider one would buy next to nothing.
#include <immintrin.h>

#include <cstring>

#include "quantise.h"

namespace shoal {
namespace {

SHOAL_INLINE int sum_of(__m256i s8) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
  return _mm_cvtsi128_si32(s);
}

// Largest magnitude as the bits of a float, which order like the numbers; >= 0x7F800000 for a NaN
// or an infinity.  (max_ps would drop a NaN.)
SHOAL_INLINE int32_t max_bits(const float* x, int count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i m = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    m = _mm256_max_epi32(m, _mm256_and_si256(bits, magnitude));
  }
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xB1)));
}

// 32 floats times inverse -> int8; returns their sum.
SHOAL_INLINE int quantise_block(const float* x, float inverse, int8_t* quants) {
  const __m256 v = _mm256_set1_ps(inverse);
  __m256i q[4];
  for (int i = 0; i < 4; ++i)
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), v));
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i in_order =
      _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(quants), in_order);
  return sum_of(_mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3])));
}

SHOAL_INLINE void put_sum(int span, const Tile& tile, int64_t block, int n, int slot, int sum,
                          int factor) {
  if (span == kSuperBlock) {
    if (tile.sums != nullptr) tile.sums[(block / 8 * n + slot) * 8 + block % 8] = int16_t(sum);
  } else if (tile.start != nullptr) {
    tile.start[block * n + slot] = factor * sum;
  }
}

template <int Span>
SHOAL_INLINE bool quantise_span(const float* x, int64_t index, const Tile& tile, int n, int slot,
                                int factor) {
  const int32_t most = max_bits(x, Span);
  const bool finite = most < 0x7F800000;
  float m;
  std::memcpy(&m, &most, 4);
  const bool zero = !finite || m < kTinyBlock;
  const float inverse = zero ? 0.0f : 127.0f / m;
  tile.scales[index * n + slot] = zero ? 0.0f : m / 127.0f;
  for (int b = 0; b < Span / kBlock; ++b) {
    const int64_t block = index * (Span / kBlock) + b;
    int8_t* quants = tile.quants + (block * n + slot) * kBlock;
    int sum = 0;
    if (finite)
      sum = quantise_block(x + b * kBlock, inverse, quants);
    else  // infinity times zero is no number
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(quants), _mm256_setzero_si256());
    put_sum(Span, tile, block, n, slot, sum, factor);
  }
  return finite;
}

template <int Span>
SHOAL_INLINE bool quantise_spans(const float* x, int dim, const Tile& tile, int n, int slot,
                                 int factor) {
  bool finite = true;
  int index = 0;
  for (; (index + 1) * Span <= dim; ++index)
    finite &= quantise_span<Span>(x + index * Span, index, tile, n, slot, factor);
  if (index * Span < dim) {
    float tail[Span];
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, x + index * Span, size_t(dim - index * Span) * 4);
    finite &= quantise_span<Span>(tail, index, tile, n, slot, factor);
  }
  return finite;
}

bool quantise_row(Scheme scheme, const float* x, int dim, const Tile& tile, int n, int slot,
                  int factor) {
  if (scheme == Scheme::int8_256) return quantise_spans<kSuperBlock>(x, dim, tile, n, slot, factor);
  return quantise_spans<kBlock>(x, dim, tile, n, slot, factor);
}

void fill_row(Scheme scheme, const int8_t* quants, const float* scales, int padded,
              const Tile& tile, int n, int slot, int factor) {
  const int span = span_of(scheme);
  for (int s = 0; s < padded / span; ++s) tile.scales[int64_t(s) * n + slot] = scales[s];
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  for (int64_t block = 0; block < padded / kBlock; ++block) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + block * kBlock));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.quants + (block * n + slot) * kBlock), q);
    const int sum = sum_of(_mm256_madd_epi16(_mm256_maddubs_epi16(ones8, q), ones16));
    put_sum(span, tile, block, n, slot, sum, factor);
  }
}

}  // namespace

const QuantiseKernels kQuantiseAvx2 = {quantise_row, fill_row};

}  // namespace shoal
