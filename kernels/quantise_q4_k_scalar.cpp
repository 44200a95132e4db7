// Q4_K blocks from floats, portable C++.
#include "lanes_scalar.h"
#include "quantise_q4_k_lanes.h"

namespace shoal {
const QuantiseQ4K kQuantiseQ4KScalar = {quantise_pair};
}
