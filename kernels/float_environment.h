// Pins the floating-point environment of a thread to the one the exactness contract assumes.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace shoal {
namespace {

// Round to nearest even, no flush to zero, no denormals as zero, no traps, for the current scope
// and thread.  A library built with -ffast-math can switch flushing on for a whole process, so
// every kernel entry and every pool thread pins for itself.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    const uint64_t pinned = 0;
    __asm__ volatile("msr fpcr, %0" : : "r"(pinned) : "memory");
  }
  ~FloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
  FloatEnvironment() : saved_(0) {}
  ~FloatEnvironment() { (void)saved_; }
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__aarch64__)
  uint64_t saved_;
#else
  unsigned saved_;
#endif
};

}  // namespace
}  // namespace shoal
