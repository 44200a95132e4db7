// Writing and reading a row's frames on sockets: see the header.
#include "wire_fanout.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <thread>

#include "wire_data_frame.h"
#include "wire_reply.h"
#include "wire_send.h"

namespace shoal {
namespace {

// How often is looked for a reply before sleeping, the core left to others in between: about 100 us
// of a core that nobody wants. To be woken on an idle virtual core takes 30 to 50 us (KVM, without
// polling in the guest).
constexpr int kLooks = 150;

// As poll(2), but for how it waits.
int poll_soon(std::vector<pollfd>& watched, int timeout_ms) {
  for (int i = 0; i < kLooks; ++i) {
    const int ready = poll(watched.data(), nfds_t(watched.size()), 0);
    if (ready != 0 || timeout_ms == 0) return ready;
    std::this_thread::yield();
  }
  return poll(watched.data(), nfds_t(watched.size()), timeout_ms);
}

// The calls that replies are awaited to.
struct Calls {
  std::vector<uint64_t>& wanted;
  uint64_t first_id;
  const std::vector<int>& sent_to;

  // A call may be answered from where it was sent alone.
  bool awaits(uint64_t call_id, int lane) const {
    const uint64_t index = call_id - first_id;
    return index < sent_to.size() && sent_to[index] == lane &&
           std::find(wanted.begin(), wanted.end(), call_id) != wanted.end();
  }
};

// A lane's bytes that have come and are not used.
struct Pending {
  uint8_t* data;
  size_t room, begin = 0, end = 0;

  // Makes room behind them.
  void settle() {
    if (begin != 0 && begin != end) std::memmove(data, data + begin, end - begin);
    end -= begin;
    begin = 0;
  }
};

// Takes the replies that a lane's bytes begin with; false: what follows is something else.
bool take_replies(Pending& pending, const RowLane& lane, int lane_index, Calls& calls,
                  const RowSums& into, double after_s, std::vector<Collected>& collected) {
  while (pending.begin < pending.end) {
    ByteSpan message;
    const uint8_t* data = pending.data + pending.begin;
    const Found found =
        find_message(data, pending.end - pending.begin, lane.stream_id, pending.room, message);
    if (found == Found::kPart) return true;
    ReplyFound reply;
    if (found == Found::kOther || !find_reply(message, reply)) return false;
    const int32_t row = 0;
    if (!calls.awaits(reply.head.call_id, lane_index) ||
        !add_reply(reply, into.grid, into.takes_bf16, &row, 1, into.sums, 1, into.dim))
      return false;
    calls.wanted.erase(std::find(calls.wanted.begin(), calls.wanted.end(), reply.head.call_id));
    const ReplyHead& head = reply.head;
    collected.push_back({head.call_id, lane_index, head.queue_us, head.compute_us, head.load_us,
                         message.size, after_s});
    pending.begin += kDataHead + message.size;
  }
  return true;
}

// Reads what a lane has; kDone: go on.
Collecting read_lane(Pending& pending, const RowLane& lane, int lane_index, Calls& calls,
                     const RowSums& into, double after_s, std::vector<Collected>& collected,
                     int& error) {
  pending.settle();
  const ssize_t n =
      recv(lane.fd, pending.data + pending.end, pending.room - pending.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
    return Collecting::kDone;
  if (n <= 0) {
    error = n < 0 ? errno : 0;
    return Collecting::kBroken;
  }
  pending.end += size_t(n);
  return take_replies(pending, lane, lane_index, calls, into, after_s, collected)
             ? Collecting::kDone
             : Collecting::kUnread;
}

}  // namespace

std::vector<RowPart> split_row(const int32_t* experts, const float* weights, int64_t num_experts,
                               const int32_t* owners, int32_t* grouped, float* grouped_weights) {
  std::vector<RowPart> parts;
  for (int64_t i = 0; i < num_experts; ++i) {
    const int32_t slot = owners[experts[i]];
    auto part = std::find_if(parts.begin(), parts.end(),
                             [slot](const RowPart& known) { return known.slot == slot; });
    if (part == parts.end()) part = parts.insert(part, RowPart{slot, 0, 0});
    ++part->end;  // counted first
  }
  std::sort(parts.begin(), parts.end(), [](const RowPart& a, const RowPart& b) {
    return a.end != b.end ? a.end > b.end : a.slot < b.slot;
  });
  int32_t next = 0;
  for (RowPart& part : parts) {
    part.begin = next;
    for (int64_t i = 0; i < num_experts; ++i) {
      if (owners[experts[i]] != part.slot) continue;
      grouped[next] = experts[i];
      grouped_weights[next++] = weights[i];
    }
    part.end = next;
  }
  return parts;
}

size_t data_frame_size(const CallArrays& call) { return kDataHead + call_frame_size(call); }

void write_data_frame(const CallArrays& call, uint32_t stream_id, uint8_t* out) {
  put_data_head(stream_id, call_frame_size(call), out);
  write_call_frame(call, out + kDataHead);
}

RowWires::RowWires(std::vector<RowLane> lanes, std::vector<int> lane_of_slot,
                   std::vector<int> others, size_t room)
    : lanes_(std::move(lanes)),
      lane_of_slot_(std::move(lane_of_slot)),
      others_(std::move(others)),
      room_(room),
      buffer_(lanes_.size() * room) {}

std::vector<SentCall> RowWires::send(const RowCall& row) {
  experts_.resize(size_t(row.num_experts));
  weights_.resize(size_t(row.num_experts));
  const std::vector<RowPart> parts = split_row(row.experts, row.weights, row.num_experts,
                                               row.owners, experts_.data(), weights_.data());
  sent_to_.clear();
  for (const RowPart& part : parts) {
    const int lane = lane_of_slot_[size_t(part.slot)];
    if (lane < 0 || std::find(sent_to_.begin(), sent_to_.end(), lane) != sent_to_.end()) return {};
    sent_to_.push_back(lane);
  }
  first_id_ = row.head.call_id;
  std::vector<SentCall> sent;
  for (size_t i = 0; i < parts.size(); ++i) {
    const RowLane& lane = lanes_[size_t(sent_to_[i])];
    const int32_t offsets[2] = {0, parts[i].end - parts[i].begin};
    CallArrays call{row.head,
                    row.values,
                    row.scales,
                    offsets,
                    experts_.data() + parts[i].begin,
                    weights_.data() + parts[i].begin};
    call.head.call_id += i;
    frame_.resize(data_frame_size(call));
    write_data_frame(call, lane.stream_id, frame_.data());
    Sent one = send_all(lane.fd, frame_.data(), frame_.size());
    sent.push_back({sent_to_[i], parts[i].slot, offsets[1], frame_.size() - kDataHead, one.error,
                    std::move(one.rest)});
  }
  return sent;
}

CollectEnd RowWires::run(const RowCall& row, const RowSums& into, double patience_s,
                         std::vector<SentCall>& sent, std::vector<Collected>& collected) {
  sent = send(row);
  std::vector<uint64_t> wanted;
  bool is_sent = !sent.empty();
  for (const SentCall& one : sent) {
    is_sent = is_sent && one.error == 0 && one.rest.empty();
    wanted.push_back(row.head.call_id + wanted.size());
  }
  if (is_sent) return collect(wanted, into, patience_s, collected);
  CollectEnd end;
  end.stop = Collecting::kUnsent;
  return end;
}

CollectEnd RowWires::collect(std::vector<uint64_t>& wanted, const RowSums& into, double patience_s,
                             std::vector<Collected>& collected) {
  using Clock = std::chrono::steady_clock;
  const auto began = Clock::now();
  const auto elapsed_s = [&] {
    return std::chrono::duration<double>(Clock::now() - began).count();
  };
  std::vector<pollfd> watched;
  std::vector<Pending> pending;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    watched.push_back({lanes_[i].fd, POLLIN, 0});
    pending.push_back({buffer_.data() + i * room_, room_});
  }
  for (int fd : others_) watched.push_back({fd, POLLIN, 0});
  Calls calls{wanted, first_id_, sent_to_};
  CollectEnd end;
  while (!wanted.empty() && end.stop == Collecting::kDone) {
    // The largest call is answered last, most likely: to be woken for the others before costs the
    // nodes of this machine a core. A descriptor below zero is not looked at.
    const int largest = calls.awaits(first_id_, sent_to_[0]) ? sent_to_[0] : -1;
    for (size_t i = 0; i < lanes_.size(); ++i) {
      watched[i].fd = largest < 0 || int(i) == largest ? lanes_[i].fd : -1;
      watched[i].revents = 0;
    }
    const double left_s = patience_s - elapsed_s();
    const int ready = left_s <= 0 ? 0 : poll_soon(watched, int(std::ceil(left_s * 1e3)));
    if (ready <= 0) end.stop = Collecting::kTime;  // a signal: Python looks after it
    for (size_t i = 0; ready > 0 && i < watched.size() && end.stop == Collecting::kDone; ++i) {
      if (watched[i].revents == 0) continue;
      end.lane = int(i);
      end.stop = i >= lanes_.size() ? Collecting::kOthers
                                    : read_lane(pending[i], lanes_[i], int(i), calls, into,
                                                elapsed_s(), collected, end.error);
    }
  }
  for (size_t i = 0; i < pending.size(); ++i) {
    const Pending& one = pending[i];
    if (one.begin != one.end)
      end.unread.emplace_back(int(i), ByteSpan{one.data + one.begin, one.end - one.begin});
  }
  return end;
}

}  // namespace shoal
