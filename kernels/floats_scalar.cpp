// Float, attention and sampling kernels of one instruction set: scalar.
#include "lanes_scalar.h"

// Queries that share a load of keys or values: as many accumulators as registers and latency ask.
#define SHOAL_QUERY_TILE 4

#include "attention_kernels.h"
#include "floats_kernels.h"
#include "sample_kernels.h"

namespace shoal {

extern const FloatsTable kFloatsScalar = kFloatsTable;
extern const AttentionTable kAttentionScalar = kAttentionTable;
extern const SampleTable kSampleScalar = kSampleTable;

}  // namespace shoal
