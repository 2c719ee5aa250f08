// Used: which rows of a pass are computed, and from which part of a weight.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mlspecqd {

// Rows are equal windows, side by side, and of window w the first rows[w] are in use. `rows` may be null: all of them are.
//
// A weight may be `number` experts' weights of n rows, one after another, and row r is multiplied by that of experts[r]. One whose
// expert is none of them is not in use. `experts` may be null: all rows are multiplied by the one weight.
struct Used {
  const int32_t* rows = nullptr;
  int64_t windows = 1;
  const int32_t* experts = nullptr;
  int64_t number = 1;

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

// Rows of one expert: from `begin` to `end` of those in use.
struct Group {
  int64_t begin, end, expert;
};

// Puts rows in use into groups by their experts, without those that have none.
inline std::vector<Group> grouped(Used used, std::vector<int64_t>& rows) {
  if (used.experts == nullptr) return {{0, static_cast<int64_t>(rows.size()), 0}};
  const auto expert_of = [&](int64_t row) { return static_cast<int64_t>(used.experts[row]); };
  const auto none = [&](int64_t row) { return expert_of(row) < 0 || expert_of(row) >= used.number; };
  rows.erase(std::remove_if(rows.begin(), rows.end(), none), rows.end());
  std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return expert_of(a) < expert_of(b); });
  std::vector<Group> groups;
  for (int64_t at = 0; at < static_cast<int64_t>(rows.size()); ++at) {
    if (groups.empty() || groups.back().expert != expert_of(rows[at])) groups.push_back({at, at, expert_of(rows[at])});
    groups.back().end = at + 1;
  }
  return groups;
}

}  // namespace mlspecqd
