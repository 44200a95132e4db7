// One pool of threads for all kernels of the process.
#pragma once
#include <cstdint>

namespace shoal {

// Threads that take part in parallel_for, the caller included.  Initially usable_cpus().
int pool_threads();

// 1 <= threads <= kMaxPoolThreads, else std::invalid_argument.  Waits for a job that is running.
void set_pool_threads(int threads);

constexpr int kMaxPoolThreads = 256;

// The untyped form of parallel_for and, with `whole`, of parallel_for_ranges.
void run_parallel(int64_t items, int64_t chunk, bool whole,
                  void (*body)(void*, int64_t, int64_t, int), void* context);

namespace detail {
template <class F>
void run_typed(int64_t items, int64_t chunk, bool whole, F& body) {
  run_parallel(
      items, chunk, whole,
      [](void* context, int64_t begin, int64_t end, int thread) {
        (*static_cast<F*>(context))(begin, end, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace detail

// Calls body(begin, end, thread) until every item of [0, items) has been covered exactly once, and
// returns when all of it is done.  Ranges are at most `chunk` long, begin at multiples of `chunk`
// and are claimed by whichever thread is free: each has a run of its own to begin with, a quarter
// of what is left of it at a time, and takes from the others' when that is done, so a thread that
// loses its core holds back a part of the rest, not its share.  The caller takes part (as thread
// 0); the others are in [1, pool_threads()).
//
// The float environment is pinned on every thread.  body must not throw.  A second concurrent
// caller, and a call from inside a body, runs its job alone and inline as thread 0: scratch belongs
// to the call or to the thread (thread_scratch), never to a static array indexed by `thread`.
template <class F>
void parallel_for(int64_t items, int64_t chunk, F&& body) {
  detail::run_typed(items, chunk, false, body);
}

// The same with one call of body for all that was claimed at once: ranges of many chunks, of one at
// last.
template <class F>
void parallel_for_ranges(int64_t items, int64_t chunk, F&& body) {
  detail::run_typed(items, chunk, true, body);
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
