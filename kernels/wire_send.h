// Bytes to a non-blocking socket.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace shoal {

// How a send ended.  error: an errno, 0 if none.  rest: what the socket did not take.
struct Sent {
  int error = 0;
  std::string rest;
};
Sent send_all(int fd, const uint8_t* data, size_t size);

}  // namespace shoal
