// The portable part of choosing kernels: what the CPU has and what SHOAL_ISA may name.
#include "cpu_features.h"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shoal {

namespace {

std::atomic<int> chosen{-1};  // -1: nobody has asked yet

#if defined(__linux__)
// CPUs' worth of time that cgroup v2's cpu.max grants ("max 100000": no limit), rounded up.
int cgroup_quota(int cpus) {
  FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
  if (file == nullptr) return cpus;
  long quota = 0, period = 0;
  const int fields = std::fscanf(file, "%ld %ld", &quota, &period);
  std::fclose(file);
  if (fields != 2 || quota <= 0 || period <= 0) return cpus;
  const long granted = (quota + period - 1) / period;
  return granted < cpus ? int(granted) : cpus;
}
#endif

#if defined(__x86_64__)
bool cpuid_has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}

bool cpuid_has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}

bool cpuid_has_amx() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx >> 24 & 1) != 0 && (edx >> 25 & 1) != 0;  // AMX-TILE, AMX-INT8
}

// Tile registers are 8 KiB of each thread's state, so Linux saves them only for a process that
// asked (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA); what other systems do is not known here.
bool may_use_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avxvnni:
      return "avxvnni";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the registers; it does not
  // know F16C on every compiler.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_has_f16c();
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avxvnni) return avx2 && cpuid_has_avx_vnni();
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::amx) {
    static const bool allowed = cpuid_has_amx() && may_use_tiles();
    return allowed && isa_available(Isa::avx512);
  }
#endif
  return isa == Isa::scalar;
}

Isa best_isa() {
  for (Isa isa : {Isa::avx512, Isa::avxvnni, Isa::avx2})
    if (isa_available(isa)) return isa;
  return Isa::scalar;
}

Isa current_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  if (isa >= 0) return Isa(isa);
  int unset = -1;
  chosen.compare_exchange_strong(unset, int(best_isa()));
  return Isa(chosen.load(std::memory_order_relaxed));
}

void set_isa(Isa isa) {
  if (!isa_available(isa)) {
    std::string available;
    for (int i = 0; i < kNumIsas; ++i)
      if (isa_available(Isa(i))) available += std::string(i == 0 ? "" : ", ") + isa_name(Isa(i));
    throw std::invalid_argument(std::string("this CPU cannot run the ") + isa_name(isa) +
                                " kernels; available: " + available);
  }
  chosen.store(int(isa), std::memory_order_relaxed);
}

int usable_cpus() {
  int cpus = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) cpus = CPU_COUNT(&allowed);
  cpus = cgroup_quota(cpus);
#endif
  return cpus < 1 ? 1 : cpus;
}

}  // namespace shoal
