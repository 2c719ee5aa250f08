// What the forms of four_bits.h for x86 have in common: where the blocks of a group lie in a register.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "four_bits.h"
#include "target.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::four_bits {

// Both x86 forms hold dword j of sixteen (eight) blocks in one register. A register as loaded holds four dwords of four (two)
// blocks, so four of them are transposed, and lane 4q + r then belongs to block 4r + q (2r + q) of the group: scales and
// activations are put into that order too.

// Of one row of x: for dword j of the blocks' even elements and of their odd ones, four elements a lane; the sums' starting
// values; the factors back; the sums themselves, for minima.
template <class Form, int lanes>
struct alignas(4 * lanes) Group {
  int32_t elements[8][lanes];
  int32_t start[sums_of(Form::kScales)][lanes];
  float factor[lanes];
  float sum[Form::kMinimum ? lanes : 1];
};

// Where, of the scales from a group's first on, that of each lane lies, if one serves so many blocks.
template <int lanes>
std::array<uint16_t, lanes> places(int64_t blocks) {
  std::array<uint16_t, lanes> out = {};
  for (int lane = 0; lane < lanes; ++lane) {
    const int block = lane % 4 * (lanes / 4) + lane / 4;
    out[lane] = static_cast<uint16_t>(block / blocks);
  }
  return out;
}

// So many of an array's numbers from `at` on: a copy where it ends before. What belongs to the next row is not used.
template <size_t count, class T>
const T* whole(const T* array, int64_t at, int64_t size, std::array<T, count>* copy) {
  if (at + static_cast<int64_t>(count) <= size) return array + at;
  *copy = {};
  std::copy(array + at, array + size, copy->begin());
  return copy->data();
}

// The kernel of a form.
#define MLSPECQD_FOUR_BITS(isa) \
  MLSPECQD_COLUMNS(isa, k / kBlock, Group<Form>) \
  namespace isa { \
  template <class Form> \
  inline constexpr Kernel kernel = {kRows, kGroup, sizeof(Group<Form>), prepare<Form>, product<Form>}; \
  }

}  // namespace mlspecqd::four_bits

#endif  // MLSPECQD_X86
