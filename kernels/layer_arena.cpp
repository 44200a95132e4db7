// Memory of a native call made of many kernels.
#include "layer_arena.h"

#include <algorithm>
#include <new>

#include "matmul.h"

namespace shoal {
namespace {

constexpr int64_t kFirstPiece = 1 << 18;  // a decode step of a wide model fits

}  // namespace

void Arena::reset() {
  used_ = 0;
  if (pieces_.size() <= 1) return;
  int64_t total = 0;
  for (const Piece& piece : pieces_) total += piece.num_bytes;
  pieces_.clear();
  add_piece(total);
}

void* Arena::take_bytes(int64_t num_bytes) {
  const int64_t rounded = round_up(num_bytes, 64);
  if (pieces_.empty() || used_ + rounded > pieces_.back().num_bytes)
    add_piece(std::max(rounded, kFirstPiece));
  void* const taken = pieces_.back().memory.get() + used_;
  used_ += rounded;
  return taken;
}

void Arena::add_piece(int64_t num_bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(num_bytes)) != 0) throw std::bad_alloc();
  pieces_.push_back({std::unique_ptr<uint8_t, Freed>(static_cast<uint8_t*>(memory)), num_bytes});
  used_ = 0;
}

Arena& empty_thread_arena() {
  thread_local Arena arena;
  arena.reset();
  return arena;
}

}  // namespace shoal
