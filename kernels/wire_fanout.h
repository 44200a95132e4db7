// A fan-out of one row on non-blocking sockets: its calls written straight from the row, its
// replies added straight to the sums, each a single whole HTTP/2 frame.  What is anything else is
// given back as it came: shoal/http2 and coordinator/fast_rows.py take it from there.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "wire_call.h"

namespace shoal {

// Groups a row's experts by the slot that owns them: the slot with the most experts first (it takes
// longest), slots of as many in ascending order, experts of one in the row's order.
struct RowPart {
  int32_t slot;
  int32_t begin, end;  // of the grouped experts
};
std::vector<RowPart> split_row(const int32_t* experts, const float* weights, int64_t num_experts,
                               const int32_t* owners, int32_t* grouped, float* grouped_weights);

// The DATA frame of a call: HTTP/2's header, gRPC's prefix, the ClientFrame.
size_t data_frame_size(const CallArrays& call);
void write_data_frame(const CallArrays& call, uint32_t stream_id, uint8_t* out);

// A lane that calls are sent to, and replies awaited from.
struct RowLane {
  int fd;
  uint32_t stream_id;
};

// A row to be sent.  head: of every call, with the id of the first; the next have those after it.
struct RowCall {
  CallHead head;
  ByteSpan values, scales;
  const int32_t* experts;
  const float* weights;
  int64_t num_experts;
  const int32_t* owners;  // the slot of each expert of the layer
};

// A call that was sent, for num_pairs experts of a slot.  frame_size: of the ClientFrame.  error:
// an errno, 0 if none.  rest: what the socket did not take.
struct SentCall {
  int lane, slot, num_pairs;
  size_t frame_size;
  int error;
  std::string rest;
};

// A reply that was added to the sums.
struct Collected {
  uint64_t call_id;
  int lane;
  uint32_t queue_us, compute_us, load_us;
  size_t frame_size;  // of the NodeFrame
  double after_s;     // since collecting began
};

// How it ended.
enum class Collecting {
  kDone,    // every call is answered
  kTime,    // the patience is over, or a signal came
  kOthers,  // another descriptor has news
  kUnread,  // a lane has brought something else
  kBroken,  // `lane` has ended: `error` says how, 0 for an orderly end
  kUnsent,  // a socket did not take all of a call, or has ended
};

// unread: (lane, bytes) that came and that nobody has looked at.
struct CollectEnd {
  Collecting stop = Collecting::kDone;
  int lane = -1;
  int error = 0;
  std::vector<std::pair<int, ByteSpan>> unread;
};

// What replies are added to: the sums of one row.
struct RowSums {
  int grid;
  bool takes_bf16;
  int64_t* sums;
  int64_t dim;
};

// Sockets that rows are sent on, one row after the other.
class RowWires {
 public:
  // lane_of_slot: -1 for none.  others: descriptors whose news end collecting.  room: bytes for a
  // reply that comes in pieces.
  RowWires(std::vector<RowLane> lanes, std::vector<int> lane_of_slot, std::vector<int> others,
           size_t room);

  int num_slots() const { return int(lane_of_slot_.size()); }

  // Sends a call to each slot that owns any of the row's experts.  Nothing is sent, and nothing
  // returned, when a slot has no lane or two have the same one.
  std::vector<SentCall> send(const RowCall& row);

  // Sends a row and, once all of it is sent, collects its replies.
  CollectEnd run(const RowCall& row, const RowSums& into, double patience_s,
                 std::vector<SentCall>& sent, std::vector<Collected>& collected);

  // Waits for the replies to the calls of the last row that `wanted` names, at most that long, adds
  // them up and takes each off `wanted`.  What is unread lies here until the next call.
  CollectEnd collect(std::vector<uint64_t>& wanted, const RowSums& into, double patience_s,
                     std::vector<Collected>& collected);

 private:
  std::vector<RowLane> lanes_;
  std::vector<int> lane_of_slot_, others_;
  size_t room_;
  std::vector<uint8_t> buffer_, frame_;
  std::vector<int32_t> experts_;  // grouped by slot
  std::vector<float> weights_;
  uint64_t first_id_ = 0;
  std::vector<int> sent_to_;  // the lane of each call
};

}  // namespace shoal
