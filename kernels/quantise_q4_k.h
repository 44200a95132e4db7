// Our own quantisation of float weights to GGUF Q4_K blocks.
#pragma once
#include <cstdint>

namespace shoal {

// values[num_rows, cols] -> out, num_rows rows of cols / 256 blocks of 144 bytes in GGUF order.
// cols is a multiple of 256; values are finite.  The bytes are part of an artifact's identity: the
// same on every CPU, compiler and number of threads.
void quantise_q4_k(const float* values, int64_t num_rows, int cols, uint8_t* out);

// One or two super-blocks, values[count * 256] -> out[count * 144].
struct QuantiseQ4K {
  void (*pair)(const float* values, int count, uint8_t* out);
};
extern const QuantiseQ4K kQuantiseQ4KScalar;
#if defined(__x86_64__)
extern const QuantiseQ4K kQuantiseQ4KAvx2;
extern const QuantiseQ4K kQuantiseQ4KAvx512;
#endif

}  // namespace shoal
