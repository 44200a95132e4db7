// One pool of threads for all kernels of the process.
#pragma once
#include <cstdint>
#include <type_traits>

namespace shoal {

// Threads that take part in parallel_for, the caller included.  Initially usable_cpus().
int pool_threads();

// 1 <= threads <= kMaxPoolThreads, else std::invalid_argument.  Waits for a job that is running.
void set_pool_threads(int threads);

constexpr int kMaxPoolThreads = 256;

// The untyped form of parallel_for.
void run_parallel(int64_t items, int64_t chunk, void (*body)(void*, int64_t, int64_t, int),
                  void* context);

// Calls body(begin, end, thread) until every item of [0, items) has been covered exactly once, and
// returns when all of it is done.  Ranges are at most `chunk` long, begin at multiples of `chunk`
// and are claimed by whichever thread is free: each has a run of its own to begin with, and takes
// from the others' when that is done, so a thread that loses its core holds back one chunk, not a
// share.  The caller takes part (as thread 0); the others are in
// [1, pool_threads()).
//
// The float environment is pinned on every thread.  body must not throw.  A second concurrent
// caller, and a call from inside a body, runs its job alone and inline as thread 0: scratch belongs
// to the call or to the thread (thread_scratch), never to a static array indexed by `thread`.
template <class F>
void parallel_for(int64_t items, int64_t chunk, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_parallel(
      items, chunk,
      [](void* context, int64_t begin, int64_t end, int thread) {
        (*static_cast<Body*>(context))(begin, end, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Says that a parallel_for comes within some 100 us: threads that sleep are woken and wait for it.
// Costs 9 us if one sleeps, which parallel_for would have taken, and nothing else.
void prepare_threads();

// Says that no parallel_for comes for a while: threads that wait for one sleep at once, and leave
// their cores to others.
void rest_threads();

// At least num_bytes of 64-byte aligned memory that belongs to the calling thread until its next
// thread_scratch call.  Contents are undefined.  Throws std::bad_alloc.
void* thread_scratch(int64_t num_bytes);

}  // namespace shoal
