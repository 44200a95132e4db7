// Picks the table of the current instruction set: SHOAL_ISA_TABLE(kFloats) is kFloatsAvx2, say.
// AVX-VNNI and AMX have kernels of their own for matrices alone.
#pragma once
#include "cpu_features.h"

#if defined(__x86_64__)
#define SHOAL_ISA_TABLE(name)                  \
  (current_isa() >= Isa::avx512 ? name##Avx512 \
   : current_isa() >= Isa::avx2 ? name##Avx2   \
                                : name##Scalar)
#else
#define SHOAL_ISA_TABLE(name) (name##Scalar)
#endif
