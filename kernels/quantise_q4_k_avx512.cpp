// Q4_K blocks from floats, AVX-512.
#include "lanes_avx512.h"
#include "quantise_q4_k_lanes.h"

namespace shoal {
const QuantiseQ4K kQuantiseQ4KAvx512 = {quantise_pair};
}
