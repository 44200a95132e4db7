// One thread polls all lent sockets, and holds the mutex but while it polls.  Who else wants the
// mutex is let in between two calls: it must not wait until a busy socket falls silent.
#include "call_server.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <new>
#include <system_error>
#include <utility>

#include "wire_data_frame.h"
#include "wire_send.h"

namespace shoal {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint32_t microseconds(double seconds) {
  return uint32_t(std::clamp(seconds * 1e6, 0.0, double(UINT32_MAX)));
}

[[noreturn]] void raise(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

void CallServer::Pipe::open() {
  int ends[2];
  if (pipe(ends) != 0) raise("CallServer: pipe");
  read_end = ends[0];
  write_end = ends[1];
  for (const int end : ends) {
    fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK);
    fcntl(end, F_SETFD, FD_CLOEXEC);
  }
}

void CallServer::Pipe::close() {
  if (read_end < 0) return;
  ::close(read_end);
  ::close(write_end);
  read_end = write_end = -1;
}

// A pipe that is full is as good: somebody will wake up.
void CallServer::Pipe::write() const {
  while (::write(write_end, "", 1) < 0 && errno == EINTR) continue;
}

void CallServer::Pipe::drain() const {
  char bytes[64];
  for (ssize_t n = 1; n > 0 || (n < 0 && errno == EINTR);)
    n = ::read(read_end, bytes, sizeof bytes);
}

struct CallServer::Lent {
  Lent(uint64_t id, const Loan& loan, size_t room)
      : id(id), loan(loan), room(room), buffer(new uint8_t[room]) {}
  ByteSpan unread() const { return {buffer.get() + begin, end - begin}; }

  const uint64_t id;
  const Loan loan;
  const size_t room;
  const std::unique_ptr<uint8_t[]> buffer;
  size_t begin = 0, end = 0;  // of what is unread
  bool has_unread = false;    // whole messages, perhaps
  uint64_t num_calls = 0;
  size_t received = 0, sent = 0;
  double heard_s = now_s();
  std::string unsent, reply;
};

// Another thread's hold on the mutex.
class CallServer::Visit {
 public:
  explicit Visit(CallServer& server) : server_(server) {
    server.num_visitors_.fetch_add(1);
    lock_ = std::unique_lock<std::mutex>(server.mutex_);
  }
  ~Visit() {
    server_.num_visitors_.fetch_sub(1);
    lock_.unlock();
    server_.let_in_.notify_one();
  }

 private:
  CallServer& server_;
  std::unique_lock<std::mutex> lock_;
};

CallServer::CallServer(size_t max_message_size, int64_t max_weight_bytes)
    : max_message_size_(max_message_size), max_weight_bytes_(max_weight_bytes) {
  wake_.open();
  try {
    news_.open();
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    wake_.close();
    news_.close();
    throw;
  }
}

CallServer::~CallServer() { close(); }

void CallServer::close() {
  if (!thread_.joinable()) return;
  {
    const Visit visit(*this);
    is_closing_ = true;
  }
  wake_.write();
  thread_.join();
  wake_.close();
  news_.close();
}

uint64_t CallServer::lend(const Loan& loan) {
  uint64_t id;
  {
    const Visit visit(*this);
    id = next_id_++;
    lent_.emplace(id, std::make_unique<Lent>(id, loan, max_message_size_ + kDataHead));
    has_changed_ = true;
  }
  wake_.write();
  return id;
}

std::optional<Returned> CallServer::take_back(uint64_t id) {
  std::optional<Returned> taken;
  bool was_lent = false;
  {
    const Visit visit(*this);
    const auto lent = lent_.find(id);
    was_lent = lent != lent_.end();
    if (was_lent) {
      taken = account(*lent->second, Why::kAsked, 0);
      lent_.erase(lent);
      has_changed_ = true;
    }
    const auto told = std::find_if(returned_.begin(), returned_.end(),
                                   [id](const Returned& returned) { return returned.id == id; });
    if (told != returned_.end()) {
      taken = std::move(*told);
      returned_.erase(told);
    }
  }
  // Whoever polls a socket keeps it from being closed.
  if (was_lent) wake_.write();
  return taken;
}

std::vector<Returned> CallServer::news() {
  news_.drain();
  const Visit visit(*this);
  return std::exchange(returned_, {});
}

double CallServer::quiet_s(uint64_t id) {
  const Visit visit(*this);
  const auto lent = lent_.find(id);
  return lent == lent_.end() ? 0 : now_s() - lent->second->heard_s;
}

void CallServer::shut() {
  const Visit visit(*this);
  is_shut_ = true;
}

void CallServer::open() {
  const Visit visit(*this);
  is_shut_ = false;
}

void CallServer::serve(std::map<uint32_t, std::shared_ptr<ServedLayer>> layers) {
  const Visit visit(*this);
  layers_.swap(layers);
}

void CallServer::run() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals are the main thread's
  std::vector<pollfd> watched;
  std::vector<uint64_t> ids;
  std::unique_lock<std::mutex> lock(mutex_);
  watch(watched, ids);
  while (!is_closing_) {
    if (has_changed_) watch(watched, ids);
    end_tables(lock);
    const int num_ready = poll(watched.data(), nfds_t(watched.size()), has_unread_ ? 0 : -1);
    lock.lock();
    let_in_.wait(lock, [this] { return num_visitors_.load() == 0; });
    if (num_ready > 0 && watched[0].revents != 0) wake_.drain();
    has_unread_ = false;
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto lent = lent_.find(ids[i]);
      if (lent != lent_.end()) serve_one(*lent->second, num_ready > 0 && watched[i + 1].revents);
    }
  }
  end_tables(lock);
}

// Lets go of the mutex: an end waits for the GIL.
void CallServer::end_tables(std::unique_lock<std::mutex>& lock) {
  std::vector<std::shared_ptr<ServedLayer>> ended = std::move(ended_);
  ended_.clear();
  lock.unlock();
  for (const auto& layer : ended) layer->end();
}

void CallServer::watch(std::vector<pollfd>& watched, std::vector<uint64_t>& ids) {
  watched.assign(1, {wake_.read_end, POLLIN, 0});
  ids.clear();
  for (const auto& [id, lent] : lent_) {
    watched.push_back({lent->loan.fd, POLLIN, 0});
    ids.push_back(id);
  }
  has_changed_ = false;
}

// A visitor cuts it short: what is left is looked at when the mutex is ours again.
void CallServer::serve_one(Lent& lent, bool is_readable) {
  if (!lent.has_unread && (!is_readable || !read(lent))) return;
  is_answering_.store(true, std::memory_order_relaxed);
  try {
    lent.has_unread = answer_all(lent);
    has_unread_ |= lent.has_unread;
  } catch (const std::bad_alloc&) {
    give_back(lent, Why::kOther);  // the long way says so
  }
  is_answering_.store(false, std::memory_order_relaxed);
}

// False: nothing came.
bool CallServer::read(Lent& lent) {
  if (lent.begin != 0 && lent.begin != lent.end)
    std::memmove(lent.buffer.get(), lent.buffer.get() + lent.begin, lent.end - lent.begin);
  lent.end -= lent.begin;
  lent.begin = 0;
  const ssize_t n =
      recv(lent.loan.fd, lent.buffer.get() + lent.end, lent.room - lent.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return false;
  if (n <= 0) {
    give_back(lent, Why::kEnded, n < 0 ? errno : 0);
    return false;
  }
  lent.end += size_t(n);
  lent.heard_s = now_s();
  return true;
}

// True: a visitor waits, and there may be more to answer.  The socket may be gone when it is false.
bool CallServer::answer_all(Lent& lent) {
  while (lent.begin < lent.end) {
    ByteSpan message;
    const ByteSpan unread = lent.unread();
    const Found found =
        find_message(unread.data, unread.size, lent.loan.stream_id, lent.room, message);
    if (found == Found::kPart) return false;
    if (found == Found::kOther) {
      give_back(lent, Why::kOther);
      return false;
    }
    if (num_visitors_.load() != 0) return true;
    if (!answer(lent, message)) return false;
  }
  return false;
}

// False: the socket is gone.
bool CallServer::answer(Lent& lent, ByteSpan message) {
  const auto leave_it = [&] {
    give_back(lent, Why::kOther);
    return false;
  };
  CallFound call;
  const size_t size = message.size + kMessagePrefix;
  if (is_shut_ || lent.received + size >= lent.loan.may_receive || !find_call(message, call))
    return leave_it();
  const auto known = layers_.find(call.head.layer);
  const double waited_s = now_s() - lent.heard_s;
  if (known == layers_.end() || waited_s * 1e3 >= call.head.deadline_ms) return leave_it();
  const std::shared_ptr<ServedLayer>& layer = known->second;
  ExpertTable& table = layer->table;
  if (!is_for_table(table.shape(), call, max_weight_bytes_) || !table.enter()) return leave_it();
  const Outcome outcome = answer_.compute(table, call, layer->grid, microseconds(waited_s));
  if (table.leave()) ended_.push_back(layer);
  if (outcome != Outcome::kReply) return leave_it();
  const ReplyFrame& reply = answer_.reply();
  const size_t length = reply.size(), reply_size = length + kMessagePrefix;
  frame_.resize(std::max(frame_.size(), length + kDataHead));
  put_data_head(lent.loan.stream_id, length, frame_.data());
  reply.write(frame_.data() + kDataHead);
  const bool fits =
      lent.sent + reply_size <= lent.loan.may_send && reply_size <= lent.loan.max_frame_size;
  if (!fits) lent.reply.assign(reinterpret_cast<const char*>(frame_.data()) + kDataHead, length);
  // From here on it is answered.
  lent.begin += kDataHead + message.size;
  lent.received += size;
  ++lent.num_calls;
  num_calls_.fetch_add(1, std::memory_order_relaxed);
  num_rows_.fetch_add(call.head.num_rows, std::memory_order_relaxed);
  if (fits) return send_reply(lent, reply_size);
  give_back(lent, Why::kReply);
  return false;
}

bool CallServer::send_reply(Lent& lent, size_t reply_size) {
  lent.sent += reply_size;
  Sent sent = send_all(lent.loan.fd, frame_.data(), kFrameHeader + reply_size);
  if (sent.error == 0 && sent.rest.empty()) return true;
  lent.unsent = std::move(sent.rest);
  give_back(lent, sent.error != 0 ? Why::kEnded : Why::kFull, sent.error);
  return false;
}

void CallServer::give_back(Lent& lent, Why why, int error) {
  returned_.push_back(account(lent, why, error));
  lent_.erase(lent.id);
  has_changed_ = true;
  news_.write();
}

Returned CallServer::account(Lent& lent, Why why, int error) {
  const ByteSpan unread = lent.unread();
  return {lent.id,
          why,
          error,
          lent.num_calls,
          lent.received,
          lent.sent,
          now_s() - lent.heard_s,
          std::string(reinterpret_cast<const char*>(unread.data), unread.size),
          std::move(lent.unsent),
          std::move(lent.reply)};
}

}  // namespace shoal
