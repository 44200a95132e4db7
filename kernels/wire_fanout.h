// A fan-out of one row on non-blocking sockets: its calls written straight from the row, its
// replies added straight to the sums, each a single whole HTTP/2 frame.  What is anything else is
// given back as it came: shoal/http2 and coordinator/fast_client.py take it from there.
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

// How a send ended.  error: an errno, 0 if none.  rest: what the socket did not take.
struct Sent {
  int error = 0;
  std::string rest;
};
Sent send_all(int fd, const uint8_t* data, size_t size);

// A lane that replies are awaited from.
struct Awaited {
  int fd;
  uint32_t stream_id;
};

// A call without an answer; `lane`: where it was sent, and may be answered from.
struct OpenCall {
  uint64_t call_id;
  int lane;
};

// A reply that was added to the sums.
struct Collected {
  uint64_t call_id;
  int lane;
  uint32_t queue_us, compute_us, load_us;
  size_t frame_size;  // of the NodeFrame
  double after_s;     // since collecting began
};

enum class Stop {
  kDone,    // every call is answered
  kTime,    // the patience is over, or a signal came
  kOthers,  // another descriptor has news
  kUnread,  // a lane has brought something else
  kBroken,  // `lane` has ended: `error` says how, 0 for an orderly end
};

// unread: of each lane, the bytes of its part of the buffer that nobody has looked at.
struct CollectEnd {
  Stop stop = Stop::kDone;
  int lane = -1;
  int error = 0;
  std::vector<std::pair<size_t, size_t>> unread;
};

// What replies are added to: the sums of one row.
struct RowSums {
  int grid;
  bool takes_bf16;
  int64_t* sums;
  int64_t dim;
};

// Waits for the replies to `calls`, at most that long, adds them up and takes each off `calls`.
// Each lane has its own part of the buffer, `room` bytes, for a reply that comes in pieces.
CollectEnd collect(const std::vector<Awaited>& lanes, const std::vector<int>& others,
                   std::vector<OpenCall>& calls, const RowSums& into, uint8_t* buffer, size_t room,
                   double patience_s, std::vector<Collected>& collected);

}  // namespace shoal
