// How many bytes a second this machine reads: the ceiling that decoding is measured against.
// Not a kernel of shoal and never in its wheel; bench/measure.py compiles it for this machine.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Wide __attribute__((vector_size(64)));

void read_part(const char* begin, const char* end, uint64_t* out) {
  Wide sums[8] = {};
  for (const char* p = begin; p + 512 <= end; p += 512) {
    for (int i = 0; i < 8; ++i) __builtin_prefetch(p + 4096 + 64 * i);  // as the kernels do
    for (int i = 0; i < 8; ++i) sums[i] ^= *reinterpret_cast<const Wide*>(p + 64 * i);
  }
  uint64_t all = 0;
  for (const Wide& sum : sums) {
    for (int i = 0; i < 8; ++i) all ^= sum[i];
  }
  *out = all;
}

}  // namespace

// Seconds that `threads` threads take to read size bytes once.  data: 64-byte aligned.
extern "C" double read_seconds(const char* data, size_t size, int threads) {
  std::vector<uint64_t> results(threads);
  std::vector<std::thread> running;
  const size_t part = size / threads / 512 * 512;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 1; t < threads; ++t)
    running.emplace_back(read_part, data + t * part, data + (t + 1) * part, &results[t]);
  read_part(data, data + part, &results[0]);
  for (std::thread& thread : running) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
