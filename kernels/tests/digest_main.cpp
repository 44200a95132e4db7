// Prints `op format digest`, one line an op and format: golden_digests.txt as this build computes
// it.  Needs no Python: any compiler and C++17 will do, for machines that only an emulator runs.
// Build it from this file and every kernels/*.cpp but bind*.cpp, with the flags of CMakeLists.txt
// (the _avx2, _avxvnni, _avx512 and _amx files belong to x86 only).
#include <cinttypes>
#include <cstdio>

#include "../cpu_features.h"
#include "../digest.h"

int main() {
  for (int isa = 0; isa < shoal::kNumIsas; ++isa) {
    if (!shoal::isa_available(shoal::Isa(isa))) continue;
    shoal::set_isa(shoal::Isa(isa));
    std::printf("# %s\n", shoal::isa_name(shoal::Isa(isa)));
    for (const shoal::OpDigest& digest : shoal::compute_digests())
      std::printf("%s %s %016" PRIx64 "\n", digest.op.c_str(), digest.format.c_str(), digest.value);
  }
}
