// Products x [M, K] bfloat16 by w [N, K] of integers in bytes to f32 [M, N], K a multiple of 32, for each instruction set and each
// form of weight: with a scale for each row, with one for each group along K, and with a minimum for each group too.
//
// Activations are rounded to eight bits by blocks of 32, as in four_bits.h: x is taken for q * a/127, and with integers e
//   y[m, n] = (sum over blocks of (sum of e q) * a/127) * scale[n], or
//   y[m, n] = sum over blocks and scales of (sum of e q) * (a/127 * scale) + (sum of q) * a/127 * minimum.
// Sums of integers are exact in any order. The sum over blocks is one accumulator's, in order, and its lanes are added in one
// order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "four_bits.h"

namespace mlspecqd::int8 {

constexpr int kBlock = four_bits::kBlock, kHalf = kBlock / 2;
constexpr int64_t kNear = 512;  // bytes

// A weight of so many rows as it is stored. Scales are f32 [N], or float16 of each 2^shift halves of blocks, as are minima, which
// may be null.
struct Weight {
  const uint8_t* codes;
  const void* scales;
  const uint16_t* minima;
  int64_t rows;
  int shift;
};

// One instruction set's product for a form: rows of x are prepared in blocks of up to `rows`, each of `step_bytes` for every `step`
// elements of K, rounded up; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t step;
  int64_t step_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride);
};

// The forms: what is subtracted from codes; whether scales are of groups; whether there are minima.
struct Rows {
  static constexpr int kOffset = 128;
  static constexpr bool kGroups = false, kMinimum = false;
};
struct Groups {
  static constexpr int kOffset = 128;
  static constexpr bool kGroups = true, kMinimum = false;
};
struct Unsigned {
  static constexpr int kOffset = 0;
  static constexpr bool kGroups = true, kMinimum = true;
};

// The integers of a block of x in order, and the factor back.
struct Block {
  int8_t elements[kBlock];
  float factor;
};

inline Block rounded(const uint16_t* x) {
  four_bits::portable::Block halves;
  four_bits::portable::prepare_block(x, 1, &halves);
  Block block;
  for (int i = 0; i < kBlock; ++i) block.elements[i] = static_cast<int8_t>(halves.elements[i % 2 * kHalf + i / 2]);
  block.factor = halves.factor;
  return block;
}

// How many scales a row of K elements in groups has.
inline int64_t groups_of(const Weight& w, int64_t k) { return (k / kHalf + (int64_t{1} << w.shift) - 1) >> w.shift; }

namespace portable {

constexpr int kRows = 4;
template <class Form>
constexpr int kStep = kBlock;

// `sums` are those of the halves times the factor, for minima.
template <class Form>
struct Step {
  int16_t elements[kBlock];
  float factor, sums[2];
};

template <class Form>
void prepare_step(const uint16_t* x, int, Step<Form>* step) {
  const Block block = rounded(x);
  std::copy(block.elements, block.elements + kBlock, step->elements);
  step->factor = block.factor;
  int totals[2] = {};
  for (int i = 0; i < kBlock; ++i) totals[i / kHalf] += block.elements[i];
  for (int half = 0; half < 2; ++half) step->sums[half] = static_cast<float>(totals[half]) * block.factor;
}

template <class Form, int MT>
void columns(const Step<Form>* x, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride) {
  const int64_t groups = groups_of(w, k);
  for (int64_t n = begin; n < end; ++n) {
    float sums[MT] = {};
    const Step<Form>* step = x;
    for (int64_t at = 0; at < k; at += kBlock, step += MT) {
      int16_t e[kBlock];
      for (int i = 0; i < kBlock; ++i) e[i] = static_cast<int16_t>(w.codes[n * k + at + i] - Form::kOffset);
      float scale[2] = {}, minimum[2] = {};
      for (int half = 0; half < 2; ++half) {
        const int64_t where = n * groups + ((at / kHalf + half) >> w.shift);
        if constexpr (Form::kGroups) scale[half] = widened(Half{static_cast<const uint16_t*>(w.scales)[where]});
        if constexpr (Form::kMinimum) minimum[half] = widened(Half{w.minima[where]});
      }
      for (int m = 0; m < MT; ++m) {
        int32_t totals[2] = {};
        for (int half = 0; half < 2; ++half) {
          for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) totals[half] += int32_t{e[i]} * step[m].elements[i];
        }
        if constexpr (Form::kGroups) {
          for (int half = 0; half < 2; ++half) sums[m] += static_cast<float>(totals[half]) * (step[m].factor * scale[half]);
        } else {
          sums[m] += static_cast<float>(totals[0] + totals[1]) * step[m].factor;
        }
        if constexpr (Form::kMinimum) {
          for (int half = 0; half < 2; ++half) sums[m] += minimum[half] * step[m].sums[half];
        }
      }
    }
    for (int m = 0; m < MT; ++m) out[m * stride + n] = Form::kGroups ? sums[m] : sums[m] * static_cast<const float*>(w.scales)[n];
  }
}

}  // namespace portable

// What is prepared of rows, and the kernel of a form.
#define MLSPECQD_INT8(isa) \
  MLSPECQD_COLUMNS(isa, k, Step<Form>) \
  namespace isa { \
  template <class Form> \
  void prepare(const uint16_t* x, int rows, int64_t k, void* out) { \
    auto* step = static_cast<Step<Form>*>(out); \
    for (int64_t at = 0; at < k; at += kStep<Form>) { \
      const auto blocks = static_cast<int>(std::min<int64_t>(kStep<Form>, k - at) / kBlock); \
      for (int row = 0; row < rows; ++row, ++step) prepare_step(x + row * k + at, blocks, step); \
    } \
  } \
  template <class Form> \
  inline constexpr Kernel kernel = {kRows, kStep<Form>, sizeof(Step<Form>), prepare<Form>, product<Form>}; \
  }

MLSPECQD_INT8(portable)

}  // namespace mlspecqd::int8
