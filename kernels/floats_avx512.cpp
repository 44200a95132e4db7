// Float, attention and sampling kernels of one instruction set: avx512.
#include "lanes_avx512.h"

// Queries that share a load of keys or values: as many accumulators as registers and latency ask.
#define SHOAL_QUERY_TILE 8

#include "attention_kernels.h"
#include "floats_kernels.h"
#include "sample_kernels.h"

namespace shoal {

extern const FloatsTable kFloatsAvx512 = kFloatsTable;
extern const AttentionTable kAttentionAvx512 = kAttentionTable;
extern const SampleTable kSampleAvx512 = kSampleTable;

}  // namespace shoal
