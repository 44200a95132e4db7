// Blocks of table formats from floats, AVX2.
#include "lanes_avx2.h"
#include "quantise_table_lanes.h"

namespace shoal {
const QuantiseTable kQuantiseTableAvx2 = {quantise_blocks};
}
