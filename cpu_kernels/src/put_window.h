// put_window: the rows of a window into a buffer, in place.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "used.h"

namespace mlspecqd {

// buffer[b, h, start[b] + w] = values[b, h, w] for buffer [B, H, S, D] and values [B, H, W, D]; what falls outside is dropped, and
// what is not in use is not written. A position of a head is `row_bytes`.
inline void put_window(char* buffer, const int32_t* start, const char* values, int64_t batch, int64_t heads, int64_t slots,
                       int64_t window, int64_t row_bytes, Used used = {}) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t rows = used.of(b, window), begin = std::clamp<int64_t>(-int64_t{start[b]}, 0, rows);
    const int64_t end = std::clamp<int64_t>(slots - start[b], begin, rows);
    for (int64_t row = b * heads; row < (b + 1) * heads; ++row) {
      std::memcpy(buffer + (row * slots + start[b] + begin) * row_bytes, values + (row * window + begin) * row_bytes,
                  (end - begin) * row_bytes);
    }
  }
}

}  // namespace mlspecqd
