// Float, attention and sampling kernels of one instruction set: avx2.
#include "lanes_avx2.h"

// Queries that share a load of keys or values: as many accumulators as registers and latency ask.
#define SHOAL_QUERY_TILE 4

#include "attention_kernels.h"
#include "floats_kernels.h"
#include "sample_kernels.h"

namespace shoal {

extern const FloatsTable kFloatsAvx2 = kFloatsTable;
extern const AttentionTable kAttentionAvx2 = kAttentionTable;
extern const SampleTable kSampleAvx2 = kSampleTable;

}  // namespace shoal
