// Q4_K blocks from floats, AVX2.
#include "lanes_avx2.h"
#include "quantise_q4_k_lanes.h"

namespace shoal {
const QuantiseQ4K kQuantiseQ4KAvx2 = {quantise_pair};
}
