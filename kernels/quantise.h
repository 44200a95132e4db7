// Activation rows to int8, and quantised rows into the tiles that matrix kernels read.
#pragma once
#include "matmul.h"

namespace shoal {

// Per span of 32 or 256: m = max |x|; m < kTinyBlock gives zeros with scale 0, else
// scale = m / 127 and quant = rne(x * (127 / m)), so |quant| <= 127.
//
// Below kTinyBlock 127 / m could overflow, and converting infinity to an integer differs between
// instruction sets.
constexpr float kTinyBlock = 1e-30f;

struct QuantiseKernels {
  // One row x[dim] into slot `slot` of a tile of n rows (n = 1, slot = 0: row-major).  Columns from
  // dim to the end of the last span become zero.  tile.start and tile.sums are written if not
  // null; factor is sum_factor of the weights' format.  Returns false if a value is not finite;
  // the spans with such a value are then zero.
  bool (*quantise)(Scheme, const float* x, int dim, const Tile&, int n, int slot, int factor);

  // One quantised row, quants[P] and scales[P / span], into a slot.
  void (*fill)(Scheme, const int8_t* quants, const float* scales, int padded, const Tile&, int n,
               int slot, int factor);
};

extern const QuantiseKernels kQuantiseScalar;
#if defined(__x86_64__)
extern const QuantiseKernels kQuantiseAvx2;
#endif
const QuantiseKernels& quantise_kernels(Isa isa);

// x[T, dim] -> quants[T, P], scales[T, P / span]; bad[T] becomes 1 for rows with a value that is
// not finite and 0 for the others.  Scheme::f32: only bad is written.
void quantise_rows(Scheme scheme, const float* x, int num_rows, int dim, int8_t* quants,
                   float* scales, uint8_t* bad);

}  // namespace shoal
