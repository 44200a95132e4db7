// Blocks of table formats from floats, AVX-512.
#include "lanes_avx512.h"
#include "quantise_table_lanes.h"

namespace shoal {
const QuantiseTable kQuantiseTableAvx512 = {quantise_blocks};
}
