// Reads through io_uring, by its own three system calls: no liburing.  A Ring knows nothing of
// experts: shoal/experts/readers decides what is read, when, and what becomes of an error.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace shoal {

// What a direct read of the open file asks of its offset and length, and of its address, in bytes
// (statx, Linux 6.1); (0, 0): it has no direct reads.  Empty where the system does not tell.
std::optional<std::pair<uint32_t, uint32_t>> direct_alignment(int descriptor);

// The priority of a read, as ioprio_set(2) and io_uring take it; 0: the process's own.  A prefetch
// has the last level of the best-effort class, not the idle class: a read at the drive keeps its
// priority when a demand joins it, and idle reads may wait for as long as others use the drive.
constexpr uint16_t read_priority(bool is_prefetch) { return is_prefetch ? 2 << 13 | 7 : 0; }

// Gives this thread that priority.  Returns 0, or an errno; ENOSYS where there is none.
int set_read_priority(bool is_prefetch);

struct RingRead {
  uint64_t id;  // comes back in RingDone; not kWakeId
  int file;     // a descriptor, or the place among the registered files
  bool is_registered_file;
  bool may_block;    // through the page cache: a kernel thread does it
  bool is_prefetch;  // of the lowest priority, where the device's scheduler knows any
  int64_t offset;
  uint8_t* data;  // must live until its RingDone
  uint32_t num_bytes;
};

struct RingDone {
  uint64_t id;
  int64_t result;  // bytes read, or -errno
};

struct MemoryPart {
  uint8_t* data;
  size_t num_bytes;
};

// One thread waits; any thread submits and wakes.
class Ring {
 public:
  static constexpr uint64_t kWakeId = ~uint64_t{0};

  // At most `entries` reads may be under way.  Throws std::system_error: ENOSYS where this build or
  // kernel has no io_uring (or none new enough, Linux 5.11), EPERM where it is forbidden.
  explicit Ring(unsigned entries);
  // Waits for all that is under way (unless abandoned): the memory that it fills belongs to others.
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Gives the first reads of the list to the kernel and returns how many: the rest it had no
  // resources for.
  size_t submit(const std::vector<RingRead>& reads);
  // What `submit` would hand to the kernel for it, a struct io_uring_sqe: to be looked at.
  std::vector<uint8_t> entry(const RingRead& read);
  // Returns what has ended, after waiting for something if nothing has.  Empty after `timeout_s`, a
  // wake, or a signal.
  std::vector<RingDone> wait(double timeout_s);
  // Ends the wait under way, or the next one.
  void wake();

  // Waits for nothing any more: what is under way may never end.  The kernel keeps what is its own
  // until it does, or the process is gone; whoever calls sees to it that the memory stays.
  void abandon() { is_abandoned_ = true; }

  // Names memory that many reads will go into, in place of what was named before.  A piece of it is
  // pinned once it has been read into as often as it has bytes: pinning touches what was not.
  // Returns 0, or an errno: then none will be pinned, and reads work all the same.
  int register_memory(const std::vector<MemoryPart>& parts);
  // Makes files known in place of those known before.  Returns as above.
  int register_files(const std::vector<int>& descriptors);
  size_t pinned_bytes();
  // Why a piece could not be pinned, an errno; 0: all could that were due.
  int pin_error();

 private:
  struct Piece {  // of registered memory; its place in the vector is its place in the kernel's
                  // table
    uintptr_t begin, end;
    size_t bytes_read;  // asked for
    bool is_pinned;
  };

  int find_piece(const RingRead& read);
  void pin(size_t index);
  void fill_entry(const RingRead& read, void* at);
  size_t enter_all(size_t count);
  void collect(std::vector<RingDone>& done);
  void unmap();

  int descriptor_ = -1;
  void* ring_ = nullptr;
  size_t ring_bytes_ = 0;
  void* entries_ = nullptr;
  size_t entries_bytes_ = 0;
  unsigned num_entries_ = 0;
  uint32_t* submit_tail_ = nullptr;
  uint32_t submit_mask_ = 0;
  uint32_t *complete_head_ = nullptr, *complete_tail_ = nullptr;
  uint32_t complete_mask_ = 0;
  void* completions_ = nullptr;
  std::mutex submit_mutex_, complete_mutex_;
  std::vector<Piece> pieces_;  // ascending
  int pin_error_ = 0;
  bool has_files_ = false;
  std::atomic<bool> is_wake_pending_{false};
  std::atomic<size_t> under_way_{0};
  std::atomic<bool> is_abandoned_{false};
};

}  // namespace shoal
