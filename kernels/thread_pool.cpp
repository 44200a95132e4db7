// The pool behind parallel_for.
//
// One job at a time.  `state_` says whether a job is open and how many workers are inside it:
//
//     generation << 17 | open << 16 | workers inside
//
// A worker enters an open job that it has not seen by adding one, works until no chunk is left, and
// leaves by subtracting one.  The caller closes the job when no chunk is left and waits only for
// the workers that are inside: one that sleeps through a short job costs nothing, and none can
// mistake a new job's descriptor for the old one's.
//
// Each thread begins with a run of chunks of its own, and helps where chunks are left when it is
// done.  It claims a quarter of what its run has left, one chunk at last: a claim is a fence, which
// waits for all loads before it, and nothing streams meanwhile.  Weights lie in the order of the
// chunks: were they dealt out one by one, every thread would fetch ahead, by hardware and by the
// kernels' hints, what another one reads (a 330 MB product on two threads of a Zen 4: 23 GB/s
// dealt, 32 in runs, the probe 34 to 37).
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu_features.h"
#include "float_environment.h"

namespace shoal {

namespace {

constexpr uint64_t kInside = 0xFFFF, kOpen = 1 << 16, kGeneration = 1 << 17;

// A worker between jobs: about 20 us of pauses (a decode step's gap between two products), then
// yields, which let a neighbour have the core, then sleep.  To wake a sleeper takes the caller 9 us
// and the sleeper 30 to 45 (a virtual Zen 4): prepare_threads does it beside other work.
constexpr int kPauses = 600, kYields = 200;

// Of what is left of a run, claimed at once: one part in so many.  A thread that loses its core
// with it holds back no more than that.
constexpr int64_t kClaimedPart = 4;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  int64_t items, chunk;
  bool whole;  // one call of body for all chunks that were claimed at once
  void (*body)(void*, int64_t, int64_t, int);
  void* context;
};

// Chunks [first, end).
void compute(const Job& job, int64_t first, int64_t end, int thread) {
  const int64_t step = job.whole ? end - first : 1;
  for (; first < end; first += step)
    job.body(job.context, first * job.chunk, std::min((first + step) * job.chunk, job.items),
             thread);
}

class Pool {
 public:
  explicit Pool(int threads) { start(threads); }

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    while (busy_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
    {
      std::lock_guard<std::mutex> lock(sleep_);
      quit_ = true;
    }
    awake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    quit_ = false;
    start(threads);
    busy_.store(false, std::memory_order_release);
  }

  void run(const Job& job) {
    const int64_t chunks = (job.items + job.chunk - 1) / job.chunk;
    if (chunks <= 1 || threads() == 1 || busy_.exchange(true, std::memory_order_acquire)) {
      compute(job, 0, chunks, 0);
      return;
    }
    const int runs = int(std::min<int64_t>(threads(), chunks));
    job_ = job, runs_of_job_ = runs;
    for (int i = 0; i < runs; ++i) {
      runs_[i].next.store(chunks * i / runs, std::memory_order_relaxed);
      runs_[i].end = chunks * (i + 1) / runs;
    }
    const uint64_t generation = state_.load(std::memory_order_relaxed) / kGeneration + 1;
    state_.store(generation * kGeneration | kOpen);  // seq_cst: before the load of sleepers_
    wake();
    work(0);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; state_.load(std::memory_order_acquire) & kInside; ++spins) {
      if (spins < 4000)
        pause();
      else
        std::this_thread::yield();
    }
    busy_.store(false, std::memory_order_release);
  }

  void rest() { rested_.store(state_.load(std::memory_order_relaxed) / kGeneration); }

  void prepare() {
    calls_.fetch_add(1);  // seq_cst: before the load of sleepers_
    wake();
  }

 private:
  struct alignas(64) Run {
    std::atomic<int64_t> next{0};  // chunk
    int64_t end = 0;
  };

  void start(int threads) {
    threads_.store(threads, std::memory_order_relaxed);
    const uint64_t seen = state_.load(std::memory_order_relaxed) / kGeneration;
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i, seen] { serve(i, seen); });
  }

  void wake() {
    if (sleepers_.load() == 0) return;
    {
      std::lock_guard<std::mutex> lock(sleep_);
    }
    awake_.notify_all();
  }

  // The thread's own run first, then what is left of the others'.
  void work(int thread) {
    const Job job = job_;
    const int runs = runs_of_job_;
    for (int i = 0; i < runs; ++i) {
      Run& run = runs_[(thread + i) % runs];
      for (int64_t first, end; claim(run, &first, &end);) compute(job, first, end, thread);
    }
  }

  static bool claim(Run& run, int64_t* first, int64_t* end) {
    *first = run.next.load(std::memory_order_relaxed);
    do {
      if (*first >= run.end) return false;
      *end = *first + std::max<int64_t>(1, (run.end - *first) / kClaimedPart);
    } while (!run.next.compare_exchange_weak(*first, *end, std::memory_order_relaxed));
    return true;
  }

  // True when the worker is inside the job of the returned generation.
  bool enter(uint64_t* seen) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (state / kGeneration != *seen) {
      if (!(state & kOpen)) {
        *seen = state / kGeneration;  // over before we came
        return false;
      }
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
        *seen = state / kGeneration;
        return true;
      }
    }
    return false;
  }

  bool is_new(uint64_t seen) const { return state_.load() / kGeneration != seen; }

  void serve(int thread, uint64_t seen) {
    FloatEnvironment pinned;
    uint64_t called = 0;
    for (;;) {
      while (!is_new(seen) && !quit_) wait(seen, &called);
      if (quit_) return;
      if (!enter(&seen)) continue;
      work(thread);
      state_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Waits for a job, or a call of prepare, that the worker has not seen.
  void wait(uint64_t seen, uint64_t* called) {
    const auto is_over = [&] { return is_new(seen) || calls_.load() != *called || quit_; };
    const auto is_resting = [&] { return rested_.load(std::memory_order_relaxed) == seen; };
    for (int i = 0; i < kPauses && !is_resting() && !is_over(); ++i) pause();
    for (int i = 0; i < kYields && !is_resting() && !is_over(); ++i) std::this_thread::yield();
    if (!is_over()) {
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1);  // seq_cst: before the loads of state_ and calls_
      awake_.wait(lock, is_over);
      sleepers_.fetch_sub(1);
    }
    *called = calls_.load();
  }

  Job job_{};
  int runs_of_job_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
  Run runs_[kMaxPoolThreads];
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<uint64_t> calls_{0};   // of prepare
  std::atomic<uint64_t> rested_{0};  // the last generation before a rest
  std::atomic<int> threads_{1};
  std::atomic<bool> busy_{false}, quit_{false};
  std::mutex sleep_;
  std::condition_variable awake_;
  std::vector<std::thread> workers_;
};

// Never destroyed: workers may still be waiting when the process runs its static destructors.
Pool& pool() {
  static Pool* const instance = new Pool(usable_cpus());
  return *instance;
}

struct Scratch {
  void* memory = nullptr;
  int64_t num_bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

int pool_threads() { return pool().threads(); }

void set_pool_threads(int threads) {
  if (threads < 1 || threads > kMaxPoolThreads)
    throw std::invalid_argument("threads = " + std::to_string(threads) + ": must be in 1.." +
                                std::to_string(kMaxPoolThreads));
  if (threads != pool().threads()) pool().resize(threads);
}

void run_parallel(int64_t items, int64_t chunk, bool whole,
                  void (*body)(void*, int64_t, int64_t, int), void* context) {
  if (items <= 0) return;
  FloatEnvironment pinned;
  pool().run({items, std::max<int64_t>(1, chunk), whole, body, context});
}

void prepare_threads() { pool().prepare(); }

void rest_threads() { pool().rest(); }

void* thread_scratch(int64_t num_bytes) {
  thread_local Scratch scratch;
  if (scratch.num_bytes < num_bytes) {
    const int64_t rounded = (num_bytes + 4095) / 4096 * 4096;
    std::free(scratch.memory);
    scratch = Scratch{nullptr, 0};
    if (posix_memalign(&scratch.memory, 64, size_t(rounded)) != 0) {
      scratch.memory = nullptr;
      throw std::bad_alloc();
    }
    scratch.num_bytes = rounded;
  }
  return scratch.memory;
}

}  // namespace shoal
