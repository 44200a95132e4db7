// populate() of store_memory.h: one call to the kernel where it knows how (Linux 5.14), else a
// touch of every page.
#include "store_memory.h"

#include <cerrno>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shoal {

namespace {

constexpr size_t kPage = 4096;  // the smallest there is; where pages are larger, a few touches more

// A write that changes nothing, whoever else writes: zero becomes zero, in one locked step.
void touch(uint8_t* byte) {
  uint8_t expected = 0;
  __atomic_compare_exchange_n(byte, &expected, 0, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

}  // namespace

int populate(uint8_t* data, size_t num_bytes) {
  if (num_bytes == 0) return 0;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) & ~uintptr_t{kPage - 1};
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + num_bytes;
#if defined(__linux__)
#if defined(MADV_POPULATE_WRITE)
  constexpr int kPopulateWrite = MADV_POPULATE_WRITE;
#else
  constexpr int kPopulateWrite = 23;  // of Linux 5.14, whatever the headers know
#endif
  if (madvise(reinterpret_cast<void*>(first), end - first, kPopulateWrite) == 0) return 0;
  if (errno != EINVAL)
    return errno;  // EINVAL: an older kernel, or pages that are larger than 4 KiB
#endif
  for (uintptr_t page = first; page < end; page += kPage) {
    touch(page < reinterpret_cast<uintptr_t>(data) ? data : reinterpret_cast<uint8_t*>(page));
  }
  return 0;
}

}  // namespace shoal
