// attention: softmax(q k^T / sqrt(D)) v over a range of slots for each query, bfloat16 to f32, once for each instruction set.
//
// Notation: B batch, W window, S slots, H query heads in groups over Hkv key/value heads, D head size.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"
#include "parallel.h"
#include "target.h"

namespace mlspecqd::attention {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

using Attend = void(const Lanes* q, const uint16_t* k, const uint16_t* v, const Integers& first, const Integers& last, int64_t slots,
                    int64_t depth, float scale, Lanes* weights, Lanes* out);

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace portable {
#define TARGET
#include "attention.inc"
#undef TARGET
}  // namespace portable

#if defined(MLSPECQD_X86)

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#include "attention.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#include "attention.inc"
#undef TARGET
}  // namespace avx512

#endif  // MLSPECQD_X86

struct Shape {
  int64_t batch, heads, kv_heads, window, slots, depth;
};

// out [B, W, H, D] from q [B, H, W, D] and k, v [B, Hkv, S, D]; the query at [b, w] sees the slots from first[b, w] up to, but not
// including, last[b, w].
template <class Pool>
void attention(Attend& attend, Pool& pool, const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* first,
               const int32_t* last, float* out, const Shape& s) {
  const int64_t rows = s.heads / s.kv_heads * s.window, blocks = (rows + kLanes - 1) / kLanes, heads = s.batch * s.kv_heads;
  const auto one = [&](int64_t chunk) {
    const int64_t head = chunk / blocks, begin = chunk % blocks * kLanes, batch = head / s.kv_heads;
    const int64_t lanes = std::min<int64_t>(kLanes, rows - begin);
    std::vector<Lanes> queries(s.depth), result(s.depth);
    alignas(64) int32_t from[kLanes] = {}, to[kLanes] = {};
    int64_t slots = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = begin + lane, window = batch * s.window + row % s.window;
      from[lane] = std::max<int32_t>(first[window], 0);
      to[lane] = static_cast<int32_t>(std::min<int64_t>(last[window], s.slots));
      slots = std::max<int64_t>(slots, to[lane]);
      for (int64_t d = 0; d < s.depth; ++d) queries[d][lane] = widened(q[(head * rows + row) * s.depth + d]);
    }
    std::vector<Lanes> weights(slots);
    Integers lows, highs;
    std::memcpy(&lows, from, sizeof lows);
    std::memcpy(&highs, to, sizeof highs);
    const int64_t cache = head * s.slots * s.depth;
    const float scale = 1 / std::sqrt(static_cast<float>(s.depth));
    attend(queries.data(), k + cache, v + cache, lows, highs, slots, s.depth, scale, weights.data(), result.data());
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = begin + lane, h = head % s.kv_heads * (s.heads / s.kv_heads) + row / s.window;
      float* const to_row = out + ((batch * s.window + row % s.window) * s.heads + h) * s.depth;
      for (int64_t d = 0; d < s.depth; ++d) to_row[d] = result[d][lane];
    }
  };
  for_each_chunk(pool, heads * blocks, one);
}

#pragma GCC diagnostic pop

}  // namespace mlspecqd::attention
