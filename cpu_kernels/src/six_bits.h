// Products x [M, K] bfloat16 by w [N, K] in an MX format of six bits to f32 [M, N], K a multiple of 32, for each instruction set.
//
// A block of 32 elements lies in 24 bytes: 16 with the lower four bits of its codes, element i in the low half of byte i and
// element i + 16 in the high half, and 8 with their upper two bits, the sign and the exponent's first: those of element 8f + i are
// bits 2f and 2f + 1 of byte i. So word j of a block's elements, eight of them, comes of words of its bytes by shifts alone.
//
// Activations are rounded to eight bits by blocks as in four_bits.h. What a code stands for is a multiple of an integer e: of E2M3
// eight times the element, at most 60; of E3M2 sixteen times, at most 448, which is split so that bytes hold it: codes whose
// exponent begins with 1 stand for 8 times another integer, at most 56. Sums over a block are exact:
//   y[m, n] = sum over blocks of ((sum of e q) * a/127 / multiple) * scale.
// All is added in one order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <cstdint>

#include "four_bits.h"
#include "int8.h"

namespace mlspecqd::six_bits {

using four_bits::kBlock;
using four_bits::Kernel;
using four_bits::Table;
using four_bits::Weight;

constexpr int kBlockBytes = kBlock * 6 / 8, kUpper = kBlock / 2;  // where the upper bits begin
constexpr int kWord = 8, kWords = kBlock / kWord;                 // elements whose bits lie alike, of which a block has so many

// What the five bits of a code without its sign stand for: kMultiple times the element, the largest of a line for each exponent.
template <int exponent_bits, int mantissa_bits>
constexpr int16_t integer_of(int16_t magnitude) {
  int16_t integer = 0;
  for (int e = 0; e < (1 << exponent_bits) - 1; ++e) {
    integer = std::max<int16_t>(integer, static_cast<int16_t>((magnitude - (e << mantissa_bits)) * (1 << e)));
  }
  return integer;
}

// The same of each lower four bits, where the exponent's first bit is `first`, divided by `times`.
template <int exponent_bits, int mantissa_bits>
constexpr Table table_of(int first, int times) {
  Table table = {};
  for (int lower = 0; lower < 16; ++lower) {
    const int integer = integer_of<exponent_bits, mantissa_bits>(static_cast<int16_t>(first << 4 | lower));
    table[lower] = static_cast<uint8_t>(integer / times);
  }
  return table;
}

struct E2m3 {
  static constexpr auto integer = integer_of<2, 3>;
  static constexpr int kTimes = 1, kMultiple = 8;
  static constexpr Table kSmall = table_of<2, 3>(0, 1), kLarge = table_of<2, 3>(1, kTimes);
};
struct E3m2 {
  static constexpr auto integer = integer_of<3, 2>;
  static constexpr int kTimes = 8, kMultiple = 16;
  static constexpr Table kSmall = table_of<3, 2>(0, 1), kLarge = table_of<3, 2>(1, kTimes);
};

// Writes groups of blocks of each row, Group::kBlocks at once; Group::put(x, multiple, place) writes a block.
template <class Form, class Group>
void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  auto* group = static_cast<Group*>(out);
  for (int64_t at = 0; at < k; at += Group::kBlocks * kBlock) {
    for (int row = 0; row < rows; ++row, ++group) {
      const int blocks = static_cast<int>(std::min<int64_t>(Group::kBlocks, (k - at) / kBlock));
      if (blocks < Group::kBlocks) *group = {};
      for (int b = 0; b < blocks; ++b) group->put(x + row * k + at + b * kBlock, Form::kMultiple, b);
    }
  }
}

namespace portable {

constexpr int kRows = 4;

struct Group {
  static constexpr int kBlocks = 1;
  int16_t elements[kBlock];
  float factor;

  void put(const uint16_t* x, int multiple, int) {
    const int8::Block block = int8::rounded(x);
    std::copy(block.elements, block.elements + kBlock, elements);
    factor = block.factor / static_cast<float>(multiple);  // a power of two
  }
};

template <class Form>
void decode(const uint8_t* block, int16_t (&w)[kBlock]) {
  int16_t upper[kBlock];
  for (int i = 0; i < kUpper; ++i) w[i] = block[i] & 15, w[kUpper + i] = block[i] >> 4;
  for (int j = 0; j < kWords; ++j) {
    for (int i = 0; i < kWord; ++i) upper[j * kWord + i] = block[kUpper + i] >> 2 * j & 3;
  }
  for (int i = 0; i < kBlock; ++i) {
    const int16_t integer = Form::integer(static_cast<int16_t>(w[i] | (upper[i] & 1) << 4));
    w[i] = static_cast<int16_t>(upper[i] & 2 ? -integer : integer);
  }
}

template <class Form, int MT>
void columns(const Group* x, const Weight& weight, int64_t blocks, int64_t begin, int64_t end, float* out, int64_t stride) {
  const auto* scales = static_cast<const uint8_t*>(weight.scales);
  for (int64_t n = begin; n < end; ++n) {
    float sums[MT] = {};
    const Group* group = x;
    for (int64_t at = n * blocks; at < (n + 1) * blocks; ++at, group += MT) {
      int16_t w[kBlock];
      decode<Form>(weight.codes + at * kBlockBytes, w);
      for (int m = 0; m < MT; ++m) {
        int32_t total = 0;
        for (int i = 0; i < kBlock; ++i) total += int32_t{w[i]} * group[m].elements[i];
        sums[m] += (static_cast<float>(total) * group[m].factor) * as_float(uint32_t{scales[at]} << 23);
      }
    }
    for (int m = 0; m < MT; ++m) out[m * stride + n] = sums[m];
  }
}

}  // namespace portable

// The kernel of a format.
#define MLSPECQD_SIX_BITS(isa) \
  MLSPECQD_COLUMNS(isa, k / kBlock, Group) \
  namespace isa { \
  template <class Form> \
  inline constexpr Kernel kernel = {kRows, Group::kBlocks* kBlock, sizeof(Group), prepare<Form, Group>, product<Form>}; \
  }

MLSPECQD_SIX_BITS(portable)

}  // namespace mlspecqd::six_bits
