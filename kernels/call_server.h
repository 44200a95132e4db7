// Answers plain calls on sockets that it is lent, on a thread of its own that needs no Python: from
// a readable socket to a reply that is sent.  A plain call is one whole HTTP/2 DATA frame with a
// call of a layer that is in memory.  A socket that brings anything else goes back to its lender,
// with every byte that was not acted on: expert_node/fast_connection.py takes it from there.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "call_answer.h"

struct pollfd;

namespace shoal {

// A layer that calls are answered for.
class ServedLayer {
 public:
  ServedLayer(ExpertTable& table, int grid) : table(table), grid(grid) {}
  virtual ~ServedLayer() = default;

  // The table was withdrawn, and the last call on it is over (ExpertTable::leave).
  virtual void end() = 0;

  ExpertTable& table;
  const int grid;  // in [-64, 96]
};

// A socket, non-blocking, between two messages both ways, and how its one stream may be used.
struct Loan {
  int fd;
  uint32_t stream_id;
  size_t may_receive;     // bytes of messages with their prefixes, until windows are given back
  size_t may_send;        // likewise, until the peer gives windows back
  size_t max_frame_size;  // that the peer takes
};

enum class Why {
  kAsked,  // its lender took it back
  kOther,  // `unread` begins with something that is no plain call, or is none now
  kReply,  // `reply` does not fit in the peer's windows
  kFull,   // the socket did not take `unsent`
  kEnded,  // the peer closed it, or it broke: `error`
};

// A socket that went back, and what happened on it.  Messages with their prefixes.
struct Returned {
  uint64_t id;
  Why why;
  int error = 0;          // errno
  uint64_t num_calls;     // answered: each one message in, and out but for `reply`
  size_t received, sent;  // bytes of these messages
  double quiet_s;         // since it last brought anything
  std::string unread;     // bytes that nobody has acted on
  std::string unsent;     // the end of a frame that was counted as sent
  std::string reply;      // a message that was not sent
};

// All methods may be called by any thread; none with the GIL: they wait for a call that is being
// computed.
class CallServer {
 public:
  // Calls in longer messages, or that walk over more weights, are no plain ones.
  // Raises std::system_error.
  CallServer(size_t max_message_size, int64_t max_weight_bytes);
  ~CallServer();
  CallServer(const CallServer&) = delete;
  CallServer& operator=(const CallServer&) = delete;

  // Readable while `news` has something to tell.
  int news_fd() const { return news_.read_end; }

  uint64_t lend(const Loan& loan);

  // Nothing: `news` has told of it already.
  std::optional<Returned> take_back(uint64_t id);

  // The sockets that went back, each told once.
  std::vector<Returned> news();

  // How long a lent socket has brought nothing; 0: it is not lent.
  double quiet_s(uint64_t id);

  // Answer no call until `open`: others are computed, in an order that is not ours.
  void shut();
  void open();

  // Answer calls of these layers from now on, and of no others.
  void serve(std::map<uint32_t, std::shared_ptr<ServedLayer>> layers);

  // Ends the thread; lent sockets are left as they are.
  void close();

  uint64_t num_calls() const { return num_calls_.load(std::memory_order_relaxed); }
  uint64_t num_rows() const { return num_rows_.load(std::memory_order_relaxed); }
  bool is_answering() const { return is_answering_.load(std::memory_order_relaxed); }

 private:
  struct Pipe {
    int read_end = -1, write_end = -1;
    void open();
    void close();
    void write() const;
    void drain() const;
  };
  struct Lent;
  class Visit;

  void run();
  void end_tables(std::unique_lock<std::mutex>& lock);
  void watch(std::vector<pollfd>& watched, std::vector<uint64_t>& ids);
  void serve_one(Lent& lent, bool is_readable);
  bool read(Lent& lent);
  bool answer_all(Lent& lent);
  bool answer(Lent& lent, ByteSpan message);
  bool send_reply(Lent& lent, size_t reply_size);
  void give_back(Lent& lent, Why why, int error = 0);
  Returned account(Lent& lent, Why why, int error);

  const size_t max_message_size_;
  const int64_t max_weight_bytes_;
  Pipe wake_, news_;
  std::mutex mutex_;
  std::condition_variable let_in_;
  std::atomic<int> num_visitors_{0};  // other threads that want the mutex
  std::map<uint64_t, std::unique_ptr<Lent>> lent_;
  std::vector<Returned> returned_;
  std::map<uint32_t, std::shared_ptr<ServedLayer>> layers_;
  std::vector<std::shared_ptr<ServedLayer>> ended_;  // their `end` is due
  uint64_t next_id_ = 1;
  bool has_changed_ = false;  // what is lent
  bool is_shut_ = false, is_closing_ = false;
  std::atomic<uint64_t> num_calls_{0}, num_rows_{0};
  std::atomic<bool> is_answering_{false};
  // The thread's own.
  bool has_unread_ = false;
  CallAnswer answer_;
  std::vector<uint8_t> frame_;
  std::thread thread_;
};

}  // namespace shoal
