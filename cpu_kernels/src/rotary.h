// rotary: the cosines and sines of positions' angles, and the rotation of heads by them.
//
// Every number is computed by itself, and no multiply-add is fused, so that it has the same bits in whatever window it is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "floats.h"
#include "parallel.h"
#include "used.h"

namespace mlspecqd::rotary {

// cos, sin [rows, half] of position * frequency, for positions [rows] and frequencies [half].
inline void angles(const int32_t* positions, const float* frequencies, float* cos, float* sin, int64_t rows, int64_t half) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[row]) * frequencies[i];
      cos[row * half + i] = std::cos(angle), sin[row * half + i] = std::sin(angle);
    }
  }
}

constexpr int64_t kLeastElements = 16 << 10;  // of a chunk: some microseconds of work

// out [B, H, W, D] from x [B, W, H, D]: the pairs (i, i + D/2) rotated by cos, sin [B, W, D/2]; positions that are not in use are
// left as they are.
template <class Element, class Pool>
void rotate(Pool& pool, const Element* x, const float* cos, const float* sin, Element* out, int64_t batch, int64_t window,
            int64_t heads, int64_t depth, Used used = {}) {
  const std::vector<int64_t> rows = rows_in_use(used, batch * window);
  const int64_t half = depth / 2, each = kLeastElements / std::max<int64_t>(heads * depth, 1) + 1;
  const int64_t count = static_cast<int64_t>(rows.size());
  for_each_chunk(pool, (count + each - 1) / each, 0, [&](int64_t chunk, char*) noexcept {
    for (int64_t at = chunk * each; at < std::min(count, (chunk + 1) * each); ++at) {
      const int64_t row = rows[at];
      const float *const c = cos + row * half, *const s = sin + row * half;
      for (int64_t h = 0; h < heads; ++h) {
        const Element* const from = x + (row * heads + h) * depth;
        Element* const to = out + ((row / window * heads + h) * window + row % window) * depth;
        for (int64_t i = 0; i < half; ++i) {
          const float a = widened(from[i]), b = widened(from[half + i]);
          to[i] = narrowed<Element>(a * c[i] - b * s[i]);
          to[half + i] = narrowed<Element>(b * c[i] + a * s[i]);
        }
      }
    }
  });
}

}  // namespace mlspecqd::rotary
