// Products x [M, K] bfloat16 by w [N, K] in codes of four bits to f32 [M, N], K a multiple of 32, for each instruction set and each
// form of weight: MXFP4, NVFP4, integers with a scale for each group, and those with a minimum too.
//
// Activations are rounded to eight bits by blocks of 32 along K: with a = max |x| of the block, q = round(x * 127/a), ties to even,
// and x is taken for q * a/127. What codes stand for is a multiple of integers e (of E2M1 twice the element: 0, 1, 2, 3, 4, 6, 8,
// 12), so that a sum over elements that share a scale is one of integers, exact and the same in any order, and
//   y[m, n] = sum over blocks and scales of ((sum of e q) * a/127 / multiple) * scale + (sum of q) * a/127 * minimum.
// A block of x whose a is below 2^-120 counts as zero; one that holds NaN or infinity makes the whole row of y NaN.
//
// To multiply unsigned by signed bytes, as the processors do, an offset is added to e, and that times the sum of q subtracted from
// each sum.
//
// All blocks of a group lie in the lanes of a register, one a lane, so that their sums are scaled together. The sum over groups is
// one accumulator's, in order, and its lanes are added in one order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "floats.h"

namespace mlspecqd::four_bits {

constexpr int kBlock = 32;

// A weight of so many rows as it is stored. `minima` may be null; `blocks` share one scale, where a form leaves that open.
struct Weight {
  const uint8_t* codes;
  const void* scales;
  const uint16_t* minima;
  int64_t rows;
  int64_t blocks;
};

// One instruction set's product for a form: rows of x are prepared in blocks of up to `rows`, each of `group_bytes` for every group
// of `group` elements of K, rounded up; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t group;
  int64_t group_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride);
};

// The `product` of an instruction set's kernels: its function columns<Form, M> for M prepared rows, up to kRows. `depth` is what
// columns take of k, the last argument the type of what is prepared.
#define MLSPECQD_COLUMNS(isa, depth, ...) \
  namespace isa { \
  template <class Form, int... Less> \
  void some_columns(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride, \
                    std::integer_sequence<int, Less...>) { \
    constexpr decltype(&columns<Form, 1>) table[] = {columns<Form, Less + 1>...}; \
    table[rows - 1](static_cast<const __VA_ARGS__*>(x), w, depth, begin, end, out, stride); \
  } \
  template <class Form> \
  void product(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride) { \
    some_columns<Form>(x, rows, w, k, begin, end, out, stride, std::make_integer_sequence<int, kRows>()); \
  } \
  }

using Table = std::array<uint8_t, 16>;  // of each code: what it stands for, times `kMultiple`, plus `kOffset`
constexpr Table kElements = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr Table kThemselves = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The forms: what codes are; how many scales a block of 32 has, a byte each (1: E8M0, a byte 0 is scale 0; 2: E4M3), or 0: a
// float16 for one block or several; whether there are minima, which lie as such scales.
struct Mxfp4 {
  static constexpr Table kTable = kElements;
  static constexpr int kOffset = 12, kMultiple = 2, kScales = 1;
  static constexpr bool kMinimum = false;
};
struct Nvfp4 {
  static constexpr Table kTable = kElements;
  static constexpr int kOffset = 12, kMultiple = 2, kScales = 2;
  static constexpr bool kMinimum = false;
};
struct Int4 {
  static constexpr Table kTable = kThemselves;
  static constexpr int kOffset = 8, kMultiple = 1, kScales = 0;
  static constexpr bool kMinimum = false;
};
struct Uint4 {
  static constexpr Table kTable = kThemselves;
  static constexpr int kOffset = 0, kMultiple = 1, kScales = 0;
  static constexpr bool kMinimum = true;
};

constexpr int sums_of(int scales) { return scales == 2 ? 2 : 1; }  // of integers in a block

// What a block's dwords belong to: of eight, four even elements each and then four odd ones, those of the first and second half.
constexpr int kHalves[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};

// A block's largest magnitude, as the bits of a bfloat16, to the factor that makes integers of it and the one that undoes that.
struct Factors {
  float to_integer;
  float back;
};

inline Factors factors(uint32_t largest, int multiple) {
  if (largest >= 0x7f80) return {0, as_float(0x7fc00000)};
  if (largest < 7 << 7) return {0, 0};  // 2^-120
  const float a = as_float(largest << 16);
  return {127 / a, a / static_cast<float>(127 * multiple)};
}

// The bits of an E4M3 that is not negative as those of a float16, 2^-8 of it.
constexpr uint16_t half_of_e4m3(uint8_t bits) { return static_cast<uint16_t>(bits << 7); }
constexpr float kOfE4m3 = 256;

namespace portable {

// A group is a block, in the order of the packed bytes: the even elements, then the odd ones. Signed 16-bit integers, of which
// compilers know how to vectorize a sum of products.
struct Block {
  int16_t elements[kBlock];
  float factor, sum;
};

inline void prepare_block(const uint16_t* x, int multiple, Block* block) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, x[i] & 0x7fffu);
  const Factors f = factors(largest, multiple);
  int32_t total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float scaled = f.to_integer == 0 ? 0 : widened(Bf16{x[i]}) * f.to_integer;
    const auto q = static_cast<int16_t>(std::nearbyintf(scaled));
    block->elements[i % 2 * (kBlock / 2) + i / 2] = q;
    total += q;
  }
  block->factor = f.back;
  block->sum = static_cast<float>(total) * f.back;
}

template <class Form>
void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  Block* block = static_cast<Block*>(out);
  for (int64_t at = 0; at < k; at += kBlock) {
    for (int row = 0; row < rows; ++row, ++block) prepare_block(x + row * k + at, Form::kMultiple, block);
  }
}

template <class Form>
float scale_of(const Weight& w, int64_t n, int64_t blocks, int64_t b, int half) {
  const auto* bytes = static_cast<const uint8_t*>(w.scales);
  if constexpr (Form::kScales == 1) return as_float(uint32_t{bytes[n * blocks + b]} << 23);
  if constexpr (Form::kScales == 2) return widened(Half{half_of_e4m3(bytes[2 * (n * blocks + b) + half])}) * kOfE4m3;
  const int64_t groups = (blocks + w.blocks - 1) / w.blocks;
  return widened(Half{static_cast<const uint16_t*>(w.scales)[n * groups + b / w.blocks]});
}

template <class Form>
void product(const void* prepared, int rows, const Weight& weight, int64_t k, int64_t begin, int64_t end, float* out,
             int64_t stride) {
  constexpr int kSums = sums_of(Form::kScales), kPart = kBlock / 2 / kSums;
  const int64_t blocks = k / kBlock;
  for (int64_t n = begin; n < end; ++n) {
    float sums[4] = {};
    const Block* x = static_cast<const Block*>(prepared);
    for (int64_t b = 0; b < blocks; ++b, x += rows) {
      const uint8_t* codes = weight.codes + (n * blocks + b) * (kBlock / 2);
      int16_t w[kBlock];
      for (int i = 0; i < kBlock / 2; ++i) {
        w[i] = static_cast<int16_t>(Form::kTable[codes[i] & 15] - Form::kOffset);
        w[kBlock / 2 + i] = static_cast<int16_t>(Form::kTable[codes[i] >> 4] - Form::kOffset);
      }
      for (int half = 0; half < kSums; ++half) {
        const float scale = scale_of<Form>(weight, n, blocks, b, half);
        for (int m = 0; m < rows; ++m) {
          int32_t total = 0;
          for (int i = half * kPart; i < (half + 1) * kPart; ++i) {
            total += int32_t{w[i]} * x[m].elements[i] + int32_t{w[kBlock / 2 + i]} * x[m].elements[kBlock / 2 + i];
          }
          sums[m] += (static_cast<float>(total) * x[m].factor) * scale;
        }
      }
      if constexpr (Form::kMinimum) {
        const int64_t groups = (blocks + weight.blocks - 1) / weight.blocks;
        const float minimum = widened(Half{weight.minima[n * groups + b / weight.blocks]});
        for (int m = 0; m < rows; ++m) sums[m] += minimum * x[m].sum;
      }
    }
    for (int m = 0; m < rows; ++m) out[m * stride + n] = sums[m];
  }
}

template <class Form>
inline constexpr Kernel kernel = {4, kBlock, sizeof(Block), prepare<Form>, product<Form>};

}  // namespace portable

}  // namespace mlspecqd::four_bits
