// An expert call as the bytes of its ClientFrame, and back.  shoal/wire.py has the same with
// protobuf's own library: what is refused here, it decides and says why.
#pragma once
#include "wire_fields.h"

namespace shoal {

constexpr int kWireF32 = 1, kWireInt8_32 = 2, kWireInt8_256 = 3;  // Scheme of expert.proto

// Bounds of a call: shoal/limits.py.
constexpr uint32_t kMaxLayers = 1024, kMaxModelDim = 65536, kMaxExperts = 4096,
                   kMaxRowsPerCall = 512, kMaxDeadlineMs = 1u << 31;

// The fields of a call that are numbers.
struct CallHead {
  uint64_t call_id;
  uint32_t layer, deadline_ms, scheme, num_rows, dim, reply_format;
};

// A call in memory: row_offsets[num_rows + 1] ascend from 0; experts and weights have a value each
// for every pair up to the last offset.
struct CallArrays {
  CallHead head;
  ByteSpan values, scales;
  const int32_t* row_offsets;
  const int32_t* experts;
  const float* weights;
};

size_t call_frame_size(const CallArrays& call);

// Writes that many bytes.
void write_call_frame(const CallArrays& call, uint8_t* out);

// A call found in a frame.  Every size, range and index in it is legal, and every row's experts
// are distinct (shoal/wire.py, decode_call); floats are not looked at.  Spans lie in the frame's
// bytes and are aligned to nothing.
struct CallFound {
  CallHead head;
  uint32_t num_pairs;
  ByteSpan values, scales, pairs_per_row, experts, weights;
};

// False: the frame is something else, or a call that must be refused, or one in an unusual form.
bool find_call(ByteSpan frame, CallFound& found);

// Columns that the values of a row have on the wire.
uint32_t padded_dim(uint32_t scheme, uint32_t dim);

// Memory for a call's arrays as kernels take them: row_offsets [num_rows + 1] and experts
// [num_pairs] as int32, weights [num_pairs] and scales as float32, one after the other; then the
// values, if they are not aligned for floats in the frame.
size_t numbers_size(const CallFound& call);

// Fills it; returns the values, wherever they are.  `out` is aligned for floats.
const uint8_t* put_numbers(const CallFound& call, uint8_t* out);

}  // namespace shoal
