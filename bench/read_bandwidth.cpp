// How many bytes a second this machine reads: the ceiling that decoding is measured against.
// Not a kernel of shoal and never in its wheel; bench/measure.py compiles it for this machine.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Wide __attribute__((vector_size(32)));

// Streams side by side, each of its own part, without hints: what hardware fetches by itself.
template <int kStreams>
void read_part(const char* begin, size_t size, uint64_t* out) {
  Wide sums[4] = {};
  const size_t part = size / kStreams / 512 * 512;
  for (size_t at = 0; at < part; at += 512)
    for (int s = 0; s < kStreams; ++s)
      for (int i = 0; i < 16; ++i)
        sums[i % 4] ^= *reinterpret_cast<const Wide*>(begin + s * part + at + 32 * i);
  uint64_t all = 0;
  for (const Wide& sum : sums) {
    for (int i = 0; i < 4; ++i) all ^= sum[i];
  }
  *out = all;
}

}  // namespace

// Seconds that `threads` threads take to read size bytes once, each as 4 streams or as 1.
// data: 64-byte aligned.
extern "C" double read_seconds(const char* data, size_t size, int threads, int streams) {
  std::vector<uint64_t> results(threads);
  std::vector<std::thread> running;
  const size_t part = size / threads / 4096 * 4096;
  const auto read = streams == 4 ? read_part<4> : read_part<1>;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 1; t < threads; ++t) running.emplace_back(read, data + t * part, part, &results[t]);
  read(data, part, &results[0]);
  for (std::thread& thread : running) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
