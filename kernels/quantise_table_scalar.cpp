// Blocks of table formats from floats, portable.
#include "lanes_scalar.h"
#include "quantise_table_lanes.h"

namespace shoal {
const QuantiseTable kQuantiseTableScalar = {quantise_blocks};
}
