// attention: softmax(cap tanh(scale q k^T / cap)) v over a range of slots for each query, of bfloat16, float16 or float32 to f32,
// once for each instruction set.
//
// Notation: B batch, W window, S slots, H query heads in groups over Hkv key/value heads, D size of a query's and a key's head, Dv
// of a value's.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "parallel.h"
#include "target.h"
#include "used.h"

namespace mlspecqd::attention {

constexpr int kTile = 32;  // slots
constexpr int kMostLanes = 16;

// Of a query's and a key's head, and of a value's.
struct Depths {
  int64_t key, value;
};

// What becomes of a product of a query and a key.
struct Scores {
  float scale;
  float cap;  // bounds their magnitude, softly; 0 leaves them as they are
};

// One instruction set's attention of up to `lanes` query rows over one head; the arguments are `attend`'s in attention.inc.
template <class Element>
struct Kernel {
  int lanes;
  void (*attend)(const float* q, const Element* k, const Element* v, const int32_t* first, const int32_t* last, const float* sinks,
                 int64_t slots, Depths depth, Scores scores, float* tile, float* weights, float* out);
};

namespace portable {

#define TARGET

constexpr int kLanes = 4;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }

#include "attention.inc"

#undef TARGET

}  // namespace portable

#if defined(MLSPECQD_X86)

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))

constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

TARGET inline __attribute__((always_inline)) Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#include "attention.inc"

#undef TARGET

}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

TARGET inline __attribute__((always_inline)) Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#include "attention.inc"

#undef TARGET

}  // namespace avx512

#endif  // MLSPECQD_X86

struct Shape {
  int64_t batch, heads, kv_heads, window, slots;
  Depths depth;
};

// out [B, W, H, Dv] from q [B, H, W, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv]; the query at [b, w] sees the slots from first[b,
// w] to last[b, w], both included, and a logit of its head, sinks [H], which has no value; -infinity is none. Of the window at b
// the positions in use are computed; what they are not is left as it is.
template <class Element, class Pool>
void attention(const Kernel<Element>& kernel, Pool& pool, const Element* q, const Element* k, const Element* v,
               const int32_t* first, const int32_t* last, const float* sinks, float* out, Scores scores, const Shape& s,
               Used used = {}) {
  const int lanes = kernel.lanes;
  const int64_t groups = s.heads / s.kv_heads, heads = s.batch * s.kv_heads;
  int64_t most = 0, widest = 0;  // slots that any query sees, positions in use of any window
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t positions = used.of(b, s.window);
    widest = std::max(widest, positions);
    for (int64_t w = 0; w < positions; ++w) {
      most = std::max(most, std::min<int64_t>(int64_t{last[b * s.window + w]} + 1, s.slots));
    }
  }
  const int64_t blocks = (groups * widest + lanes - 1) / lanes;
  const int64_t floats =
      (s.depth.key + s.depth.value + rounded_up(most, kTile)) * lanes + kTile * std::max(s.depth.key, s.depth.value);
  const auto block = [&](int64_t chunk, char* memory) noexcept {
    const int64_t head = chunk / blocks, begin = chunk % blocks * lanes, batch = head / s.kv_heads;
    const int64_t positions = used.of(batch, s.window);
    const int there = static_cast<int>(std::min<int64_t>(lanes, groups * positions - begin));
    if (there <= 0) return;
    alignas(64) int32_t from[kMostLanes] = {}, to[kMostLanes] = {};
    alignas(64) float sink[kMostLanes] = {};
    const auto query_head = [&](int lane) { return head % s.kv_heads * groups + (begin + lane) / positions; };
    const auto position = [&](int lane) { return batch * s.window + (begin + lane) % positions; };
    int64_t slots = 0;
    for (int lane = 0; lane < there; ++lane) {
      const int64_t at = position(lane);
      from[lane] = std::max<int32_t>(first[at], 0);
      to[lane] = static_cast<int32_t>(std::min<int64_t>(int64_t{last[at]} + 1, s.slots));
      sink[lane] = sinks[query_head(lane)];
      slots = std::max<int64_t>(slots, to[lane]);
    }
    float* const queries = reinterpret_cast<float*>(memory);
    float *const result = queries + s.depth.key * lanes, *const weights = result + s.depth.value * lanes;
    float* const tile = weights + rounded_up(slots, kTile) * lanes;
    std::memset(queries, 0, s.depth.key * lanes * sizeof(float));
    for (int lane = 0; lane < there; ++lane) {
      const Element* const row = q + ((batch * s.heads + query_head(lane)) * s.window + (begin + lane) % positions) * s.depth.key;
      for (int64_t d = 0; d < s.depth.key; ++d) queries[d * lanes + lane] = widened(row[d]);
    }
    const int64_t cache = head * s.slots;
    kernel.attend(queries, k + cache * s.depth.key, v + cache * s.depth.value, from, to, sink, slots, s.depth, scores, tile,
                  weights, result);
    for (int lane = 0; lane < there; ++lane) {
      float* const to_row = out + (position(lane) * s.heads + query_head(lane)) * s.depth.value;
      for (int64_t d = 0; d < s.depth.value; ++d) to_row[d] = result[d * lanes + lane];
    }
  };
  for_each_chunk(pool, heads * blocks, floats * static_cast<int64_t>(sizeof(float)), block);
}

}  // namespace mlspecqd::attention
