// What came of a row's fan-out, as Python takes it.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "wire_fanout.h"

namespace shoal {

// (calls, why it stopped, lane, errno, replies, unread): see RowWires.run in bind_fanout.cpp.
inline nanobind::tuple report_of(const std::vector<SentCall>& sent, const CollectEnd& end,
                                 const std::vector<Collected>& collected) {
  namespace nb = nanobind;
  nb::list calls, replies, unread;
  for (const SentCall& one : sent)
    calls.append(nb::make_tuple(one.lane, one.slot, one.num_pairs, one.frame_size, one.error,
                                nb::bytes(one.rest.data(), one.rest.size())));
  for (const Collected& c : collected)
    replies.append(nb::make_tuple(c.call_id, c.lane, c.after_s, c.queue_us, c.compute_us, c.load_us,
                                  c.frame_size));
  for (const auto& [lane, bytes] : end.unread)
    unread.append(nb::make_tuple(lane, nb::bytes(bytes.data, bytes.size)));
  return nb::make_tuple(calls, int(end.stop), end.lane, end.error, replies, unread);
}

}  // namespace shoal
