// In place of cpu_features.cpp in a test build whose AVX-VNNI, AVX-512 and AMX are emulated: every
// set is available.
#include <atomic>

#include "../cpu_features.h"

namespace shoal {

static std::atomic<int> chosen{0};

const char* isa_name(Isa isa) {
  const char* const names[] = {"scalar", "avx2", "avxvnni", "avx512", "amx"};
  return names[int(isa)];
}
bool isa_available(Isa) { return true; }
Isa best_isa() { return Isa::avx512; }
Isa current_isa() { return Isa(chosen.load()); }
void set_isa(Isa isa) { chosen.store(int(isa)); }
int usable_cpus() { return 2; }

}  // namespace shoal
