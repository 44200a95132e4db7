// The Ring of store_uring.h.  Without <linux/io_uring.h>, or on another system, opening one fails
// with ENOSYS and readers fall back to preadv.
#include "store_uring.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <system_error>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/uio.h>
#if defined(IORING_ENTER_EXT_ARG) && defined(__NR_io_uring_setup)
#define SHOAL_HAS_IO_URING 1
#endif
#endif
#endif

namespace shoal {

#if defined(__linux__) && defined(__NR_statx)
std::optional<std::pair<uint32_t, uint32_t>> direct_alignment(int descriptor) {
  // Fields of struct statx by their offsets: headers older than Linux 6.1 lack the two at the end.
  constexpr unsigned kDirectIo = 0x2000;  // STATX_DIOALIGN
  constexpr size_t kMask = 0, kMemoryAlign = 0x98, kOffsetAlign = 0x9c;
  alignas(8) unsigned char told[256] = {};
  if (syscall(__NR_statx, descriptor, "", AT_EMPTY_PATH, kDirectIo, told) != 0) return {};
  const auto field = [&told](size_t offset) {
    uint32_t value;
    std::memcpy(&value, told + offset, sizeof value);
    return value;
  };
  if (!(field(kMask) & kDirectIo)) return {};
  return std::make_pair(field(kOffsetAlign), field(kMemoryAlign));
}
#else
std::optional<std::pair<uint32_t, uint32_t>> direct_alignment(int) { return {}; }
#endif

#if defined(__linux__) && defined(__NR_ioprio_set)
int set_read_priority(bool is_prefetch) {
  constexpr int kThread = 1;  // IOPRIO_WHO_PROCESS, which means a thread; 0: this one
  return syscall(__NR_ioprio_set, kThread, 0, int(read_priority(is_prefetch))) == 0 ? 0 : errno;
}
#else
int set_read_priority(bool) { return ENOSYS; }
#endif

#if defined(SHOAL_HAS_IO_URING)
namespace {

constexpr size_t kPieceBytes = size_t{32} << 20;  // of pinned memory; the kernel's limit is 1 GiB
constexpr size_t kMaxPieces = size_t{1} << 14;    // the kernel's limit, too

int enter(int ring, unsigned to_submit, unsigned min_complete, unsigned flags, const void* argument,
          size_t argument_bytes) {
  return int(
      syscall(__NR_io_uring_enter, ring, to_submit, min_complete, flags, argument, argument_bytes));
}

int change_registration(int ring, unsigned operation, const void* argument, unsigned count) {
  return int(syscall(__NR_io_uring_register, ring, operation, argument, count)) < 0 ? errno : 0;
}

uint32_t load_acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store_release(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

}  // namespace

Ring::Ring(unsigned entries) {
  io_uring_params params = {};
  params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
  params.cq_entries = 4 * entries;
  descriptor_ = int(syscall(__NR_io_uring_setup, entries, &params));
  if (descriptor_ < 0) fail(errno, "io_uring_setup");
  constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP |
                               IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG;
  if ((params.features & kNeeded) != kNeeded) {
    close(descriptor_);
    fail(ENOSYS, "io_uring of a kernel before Linux 5.11");
  }
  num_entries_ = params.sq_entries;
  ring_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                 params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  const auto map = [this](size_t size, off_t offset) {
    void* at =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_, offset);
    if (at == MAP_FAILED) return static_cast<void*>(nullptr);
    madvise(at, size, MADV_DONTFORK);  // a child must not move our indices
    return at;
  };
  ring_ = map(ring_bytes_, IORING_OFF_SQ_RING);
  entries_ = map(entries_bytes_, IORING_OFF_SQES);
  if (ring_ == nullptr || entries_ == nullptr) {
    const int error = errno;
    unmap();
    fail(error, "mmap of an io_uring");
  }
  const auto at = [this](unsigned offset) {
    return reinterpret_cast<uint32_t*>(static_cast<char*>(ring_) + offset);
  };
  submit_tail_ = at(params.sq_off.tail);
  submit_mask_ = *at(params.sq_off.ring_mask);
  complete_head_ = at(params.cq_off.head);
  complete_tail_ = at(params.cq_off.tail);
  complete_mask_ = *at(params.cq_off.ring_mask);
  completions_ = at(params.cq_off.cqes);
  uint32_t* order = at(params.sq_off.array);
  for (unsigned i = 0; i < num_entries_; ++i) order[i] = i;
}

Ring::~Ring() {
  while (under_way_.load() > 0 && !is_abandoned_.load()) wait(1.0);
  if (under_way_.load() == 0) unmap();
}

void Ring::unmap() {
  if (entries_ != nullptr) munmap(entries_, entries_bytes_);
  if (ring_ != nullptr) munmap(ring_, ring_bytes_);
  close(descriptor_);
}

// The pinned piece that holds all of a read, or -1.
int Ring::find_piece(const RingRead& read) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(read.data);
  const auto after =
      std::upper_bound(pieces_.begin(), pieces_.end(), begin,
                       [](uintptr_t address, const Piece& piece) { return address < piece.begin; });
  if (after == pieces_.begin()) return -1;
  Piece& piece = *(after - 1);
  if (begin + read.num_bytes > piece.end) return -1;
  const size_t index = size_t(&piece - pieces_.data());
  piece.bytes_read += read.num_bytes;
  if (!piece.is_pinned && piece.bytes_read >= piece.end - piece.begin) pin(index);
  return piece.is_pinned ? int(index) : -1;
}

void Ring::pin(size_t index) {
#if defined(IORING_RSRC_REGISTER_SPARSE)
  if (pin_error_ != 0) return;
  Piece& piece = pieces_[index];
  iovec buffer = {reinterpret_cast<void*>(piece.begin), piece.end - piece.begin};
  io_uring_rsrc_update2 update = {};
  update.offset = uint32_t(index);
  update.data = reinterpret_cast<uintptr_t>(&buffer);
  update.nr = 1;
  const int result = int(syscall(__NR_io_uring_register, descriptor_,
                                 IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update));
  piece.is_pinned = result == 1;
  if (!piece.is_pinned) pin_error_ = result < 0 ? errno : EAGAIN;
#else
  (void)index;
#endif
}

void Ring::fill_entry(const RingRead& read, void* at) {
  io_uring_sqe& entry = *static_cast<io_uring_sqe*>(at);
  std::memset(&entry, 0, sizeof entry);
  const int piece = find_piece(read);
  entry.opcode = piece < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED;
  if (piece >= 0) entry.buf_index = uint16_t(piece);
  entry.fd = read.file;
  if (read.is_registered_file && has_files_) entry.flags |= IOSQE_FIXED_FILE;
  if (read.may_block) entry.flags |= IOSQE_ASYNC;
  entry.ioprio = read_priority(read.is_prefetch);
  entry.off = uint64_t(read.offset);
  entry.addr = reinterpret_cast<uintptr_t>(read.data);
  entry.len = read.num_bytes;
  entry.user_data = read.id;
}

// Hands over the entries before the tail, and takes back those that the kernel did not want: only
// this function makes it look at them, under the mutex, so the tail may move backwards.
size_t Ring::enter_all(size_t count) {
  size_t taken = 0;
  while (taken < count) {
    const int result = enter(descriptor_, unsigned(count - taken), 0, 0, nullptr, 0);
    if (result < 0 && errno == EINTR) continue;
    if (result <= 0) break;
    taken += size_t(result);
  }
  if (taken < count) store_release(submit_tail_, *submit_tail_ - uint32_t(count - taken));
  return taken;
}

size_t Ring::submit(const std::vector<RingRead>& reads) {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  const size_t count = std::min<size_t>(reads.size(), num_entries_);
  const uint32_t tail = *submit_tail_;
  for (size_t i = 0; i < count; ++i) {
    fill_entry(reads[i],
               static_cast<io_uring_sqe*>(entries_) + ((tail + uint32_t(i)) & submit_mask_));
  }
  store_release(submit_tail_, tail + uint32_t(count));
  under_way_ += count;  // before the kernel sees them: one may end before this function does
  const size_t taken = enter_all(count);
  under_way_ -= count - taken;
  return taken;
}

std::vector<uint8_t> Ring::entry(const RingRead& read) {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  std::vector<uint8_t> bytes(sizeof(io_uring_sqe));
  fill_entry(read, bytes.data());
  return bytes;
}

void Ring::wake() {
  if (is_wake_pending_.exchange(true)) return;
  std::lock_guard<std::mutex> lock(submit_mutex_);
  const uint32_t tail = *submit_tail_;
  io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_)[tail & submit_mask_];
  std::memset(&entry, 0, sizeof entry);
  entry.opcode = IORING_OP_NOP;
  entry.user_data = kWakeId;
  store_release(submit_tail_, tail + 1);
  if (enter_all(1) == 0) is_wake_pending_ = false;
}

void Ring::collect(std::vector<RingDone>& done) {
  const io_uring_cqe* completions = static_cast<const io_uring_cqe*>(completions_);
  uint32_t head = *complete_head_;
  const uint32_t tail = load_acquire(complete_tail_);
  for (; head != tail; ++head) {
    const io_uring_cqe& one = completions[head & complete_mask_];
    if (one.user_data != kWakeId) done.push_back({one.user_data, one.res});
  }
  store_release(complete_head_, head);
  under_way_ -= done.size();
}

std::vector<RingDone> Ring::wait(double timeout_s) {
  std::lock_guard<std::mutex> lock(complete_mutex_);
  std::vector<RingDone> done;
  if (is_wake_pending_.exchange(false)) timeout_s = 0.0;
  collect(done);
  if (!done.empty() || timeout_s <= 0.0) return done;
  const double seconds = std::floor(timeout_s);
  __kernel_timespec timeout = {};
  timeout.tv_sec = int64_t(seconds);
  timeout.tv_nsec = int64_t((timeout_s - seconds) * 1e9);
  io_uring_getevents_arg argument = {};
  argument.ts = reinterpret_cast<uintptr_t>(&timeout);
  enter(descriptor_, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument,
        sizeof argument);  // ETIME, EINTR: there is nothing, which is what is returned
  is_wake_pending_ = false;
  collect(done);
  return done;
}

int Ring::register_memory(const std::vector<MemoryPart>& parts) {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  if (!pieces_.empty()) change_registration(descriptor_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
  pieces_.clear();
  pin_error_ = 0;
  std::vector<Piece> pieces;
  for (const MemoryPart& part : parts) {
    for (size_t start = 0; start < part.num_bytes; start += kPieceBytes) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(part.data + start);
      pieces.push_back({begin, begin + std::min(kPieceBytes, part.num_bytes - start), 0, false});
    }
  }
  if (pieces.empty()) return 0;
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  pieces.resize(std::min(pieces.size(), kMaxPieces));
#if defined(IORING_RSRC_REGISTER_SPARSE)
  io_uring_rsrc_register table = {};
  table.nr = uint32_t(pieces.size());
  table.flags = IORING_RSRC_REGISTER_SPARSE;
  const int error =
      change_registration(descriptor_, IORING_REGISTER_BUFFERS2, &table, sizeof table);
#else
  const int error = ENOSYS;
#endif
  if (error == 0) pieces_ = std::move(pieces);
  return error;
}

size_t Ring::pinned_bytes() {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  size_t sum = 0;
  for (const Piece& piece : pieces_) sum += piece.is_pinned ? piece.end - piece.begin : 0;
  return sum;
}

int Ring::pin_error() {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  return pin_error_;
}

int Ring::register_files(const std::vector<int>& descriptors) {
  std::lock_guard<std::mutex> lock(submit_mutex_);
  if (has_files_) change_registration(descriptor_, IORING_UNREGISTER_FILES, nullptr, 0);
  has_files_ = false;
  if (descriptors.empty()) return 0;
  const int error = change_registration(descriptor_, IORING_REGISTER_FILES, descriptors.data(),
                                        unsigned(descriptors.size()));
  has_files_ = error == 0;
  return error;
}

#else

Ring::Ring(unsigned) {
  throw std::system_error(ENOSYS, std::generic_category(), "this build has no io_uring");
}
Ring::~Ring() = default;
size_t Ring::submit(const std::vector<RingRead>&) { return 0; }
std::vector<uint8_t> Ring::entry(const RingRead&) { return {}; }
std::vector<RingDone> Ring::wait(double) { return {}; }
void Ring::wake() {}
int Ring::register_memory(const std::vector<MemoryPart>&) { return ENOSYS; }
int Ring::register_files(const std::vector<int>&) { return ENOSYS; }
size_t Ring::pinned_bytes() { return 0; }
int Ring::pin_error() { return 0; }

#endif

}  // namespace shoal
