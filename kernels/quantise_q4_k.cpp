// Q4_K: value = d * scale * q - dmin * min, with q in 0..15, 6-bit scale and min a sub-block of 32,
// f16 d and dmin a super-block of 256.
//
// Minimises the squared error of the weights, which is the expected error of an output when the
// activations are alike.  Three steps (quantise_q4_k_lanes.h):
//   1. for each sub-block alone: 21 candidate step sizes, each with the least-squares scale and
//      minimum of the quants it gives (the search of llama.cpp's make_qkx2_quants);
//   2. d and dmin from the largest; for each sub-block the best of 9 pairs of 6-bit integers;
//   3. twice: d and dmin by least squares for those integers, then step 2's search again; kept if
//      the super-block's error fell.  (llama.cpp stops after rounding in step 2.)
#include "quantise_q4_k.h"

#include "isa_table.h"
#include "thread_pool.h"

namespace shoal {

void quantise_q4_k(const float* values, int64_t num_rows, int cols, uint8_t* out) {
  const QuantiseQ4K& kernels = SHOAL_ISA_TABLE(kQuantiseQ4K);
  const int64_t blocks = num_rows * (cols / 256);
  parallel_for(blocks, 16, [&](int64_t b, int64_t end, int) {  // begins at a multiple of 16
    for (; b < end; b += 2) kernels.pair(values + b * 256, b + 1 < end ? 2 : 1, out + b * 144);
  });
}

}  // namespace shoal
