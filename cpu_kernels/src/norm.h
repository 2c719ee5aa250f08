// norm: y / sqrt(mean(y^2) + eps) * (offset + weight) + bias, row by row, in f32. y is x, or x less its mean.
//
// A row's numbers and squares are added in sixteen lanes, each in order, and the lanes in one fixed order, so that its bits depend
// on nothing else: neither on other rows, nor on the instruction set, since no multiply-add is fused.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "parallel.h"
#include "target.h"
#include "used.h"

namespace mlspecqd::norm {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

struct Constants {
  float eps;
  float offset;  // -0 is none: it leaves every weight as it is, -0 too
  bool centered = false;
};

#define ALWAYS inline __attribute__((always_inline))

// The mean of x - mean, or of its square.
template <bool kSquared, class Element>
ALWAYS float mean_of(const Element* x, int64_t k, float mean) {
  Lanes sums = {};
  for (int64_t at = 0; at < k; at += kLanes) {
    const int there = k - at < kLanes ? static_cast<int>(k - at) : kLanes;
    Lanes values = {};
    if (there == kLanes) {
      for (int i = 0; i < kLanes; ++i) values[i] = widened(x[at + i]) - mean;
    } else {
      for (int i = 0; i < there; ++i) values[i] = widened(x[at + i]) - mean;
    }
    sums += kSquared ? values * values : values;
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0] / static_cast<float>(k);
}

template <class Element>
ALWAYS void row(const Element* x, const Element* weight, const Element* bias, int64_t k, Constants constants, Element* out) {
  const float mean = constants.centered ? mean_of<false>(x, k, 0) : 0;
  const float factor = 1 / std::sqrt(mean_of<true>(x, k, mean) + constants.eps);
  for (int64_t i = 0; i < k; ++i) {
    const float y = (widened(x[i]) - mean) * factor * (constants.offset + widened(weight[i]));
    out[i] = narrowed<Element>(y + (bias == nullptr ? -0.0f : widened(bias[i])));
  }
}

template <class Element>
using Row = void (*)(const Element* x, const Element* weight, const Element* bias, int64_t k, Constants constants, Element* out);

namespace portable {

template <class Element>
void kernel(const Element* x, const Element* weight, const Element* bias, int64_t k, Constants constants, Element* out) {
  row(x, weight, bias, k, constants, out);
}

template <class Element>
inline constexpr Row<Element> row_of = kernel<Element>;

}  // namespace portable

#if defined(MLSPECQD_X86)

namespace avx2 {

template <class Element>
__attribute__((target("avx2,f16c"))) void kernel(const Element* x, const Element* weight, const Element* bias, int64_t k,
                                                 Constants constants, Element* out) {
  row(x, weight, bias, k, constants, out);
}

template <class Element>
inline constexpr Row<Element> row_of = kernel<Element>;

}  // namespace avx2

namespace avx512 {

template <class Element>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))) void kernel(const Element* x, const Element* weight,
                                                                          const Element* bias, int64_t k, Constants constants,
                                                                          Element* out) {
  row(x, weight, bias, k, constants, out);
}

template <class Element>
inline constexpr Row<Element> row_of = kernel<Element>;

}  // namespace avx512

#endif  // MLSPECQD_X86

#undef ALWAYS

constexpr int64_t kLeastElements = 16 << 10;  // of a chunk: some microseconds of work

// out [M, K] from x [M, K], weight [K], and bias [K] or none; rows that are not in use are left as they are.
template <class Element, class Pool>
void norm(Row<Element> kernel, Pool& pool, const Element* x, const Element* weight, const Element* bias, Constants constants,
          Element* out, int64_t m, int64_t k, Used used = {}) {
  const std::vector<int64_t> rows = rows_in_use(used, m);
  const int64_t each = kLeastElements / (k > 0 ? k : 1) + 1, count = static_cast<int64_t>(rows.size());
  for_each_chunk(pool, (count + each - 1) / each, 0, [&](int64_t chunk, char*) noexcept {
    const int64_t end = std::min(count, (chunk + 1) * each);
    for (int64_t i = chunk * each; i < end; ++i) kernel(x + rows[i] * k, weight, bias, k, constants, out + rows[i] * k);
  });
}

}  // namespace mlspecqd::norm
