// Used: which rows of a pass are computed.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mlspecqd {

// Rows are equal windows, side by side, and of window w the first rows[w] are in use. `rows` may be null: all of them are.
struct Used {
  const int32_t* rows = nullptr;
  int64_t windows = 1;

  // Of a window of so many rows; what is below 0 or beyond the window is cut.
  int64_t of(int64_t window, int64_t size) const { return rows == nullptr ? size : std::clamp<int64_t>(rows[window], 0, size); }
};

// The numbers of the rows in use among m, which are all windows', in order.
inline std::vector<int64_t> rows_in_use(Used used, int64_t m) {
  std::vector<int64_t> rows;
  const int64_t size = m / std::max<int64_t>(used.windows, 1);
  rows.reserve(m);
  for (int64_t window = 0; window < used.windows; ++window) {
    for (int64_t row = 0; row < used.of(window, size); ++row) rows.push_back(window * size + row);
  }
  return rows;
}

}  // namespace mlspecqd
