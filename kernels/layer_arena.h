// Memory of a native call made of many kernels: taken piece by piece, free again together.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace shoal {

// Beside thread_scratch, which every kernel in such a call claims anew.
class Arena {
 public:
  // Forgets what was taken.  What the call before needed is in one piece from now on.
  void reset();

  // n values, 64-byte aligned, until the next reset.  Contents are undefined.  Throws
  // std::bad_alloc.
  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(take_bytes(n * int64_t(sizeof(T))));
  }

 private:
  struct Freed {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  struct Piece {
    std::unique_ptr<uint8_t, Freed> memory;
    int64_t num_bytes;
  };

  void* take_bytes(int64_t num_bytes);
  void add_piece(int64_t num_bytes);

  std::vector<Piece> pieces_;  // the last one has room from used_ on
  int64_t used_ = 0;
};

// The calling thread's, empty.  It keeps what the largest call on that thread took.
Arena& empty_thread_arena();

}  // namespace shoal
