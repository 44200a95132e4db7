// Memory that experts are read into, given its pages before they are needed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

// Makes the system back these bytes with pages of their own, writable, as a first write would; what
// they hold stays as it is, also while others (a drive, too) write to them.  Thread-safe.  Returns
// 0, or the errno of why there is no such memory.
int populate(uint8_t* data, size_t num_bytes);

}  // namespace shoal
