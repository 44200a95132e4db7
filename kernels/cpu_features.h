// Which instruction sets this CPU has, which one the kernels use, and how many CPUs we may use.
//
// Every set gives the same bits (docs/numerics.md), so the choice is about speed alone.
#pragma once

namespace shoal {

enum class Isa : int { scalar, avx2, avxvnni, avx512, amx };
constexpr int kNumIsas = 5;

// "scalar", "avx2", "avxvnni", "avx512", "amx": the values of SHOAL_ISA.
const char* isa_name(Isa isa);

// Whether this build has kernels for the set and this CPU and operating system can run them.
// avx2 asks for FMA and F16C too; avxvnni for avx2 and AVX-VNNI; avx512 for F, BW, VL, DQ and VNNI;
// amx for avx512, AMX-TILE and AMX-INT8, and on Linux for the kernel's leave to use them, which
// asking obtains.
bool isa_available(Isa isa);

// The fastest available set but for amx, which shoal.numerics.verify turns on once its digests
// hold.
Isa best_isa();

// The set that kernels use: best_isa() until set_isa.
Isa current_isa();

// Switches all kernels of the process; calls in flight finish on the set they began with.
// Throws std::invalid_argument, which lists the available sets, for one that is not available.
void set_isa(Isa isa);

// CPUs this process may run on: the affinity mask, cut down to the cgroup's CPU quota; at least 1.
int usable_cpus();

}  // namespace shoal
