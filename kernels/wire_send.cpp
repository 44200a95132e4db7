// See the header.
#include "wire_send.h"

#include <sys/socket.h>

#include <cerrno>

namespace shoal {
namespace {

#ifdef MSG_NOSIGNAL
constexpr int kSendFlags = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int kSendFlags = MSG_DONTWAIT;  // Python ignores SIGPIPE
#endif

}  // namespace

Sent send_all(int fd, const uint8_t* data, size_t size) {
  Sent sent;
  size_t at = 0;
  while (at < size) {
    const ssize_t n = send(fd, data + at, size - at, kSendFlags);
    if (n >= 0) {
      at += size_t(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      sent.rest.assign(reinterpret_cast<const char*>(data + at), size - at);
      break;
    } else if (errno != EINTR) {
      sent.error = errno;
      break;
    }
  }
  return sent;
}

}  // namespace shoal
