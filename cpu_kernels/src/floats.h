// Floating-point numbers from their bits.

#pragma once

#include <cstdint>
#include <cstring>

namespace mlspecqd {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widened(uint16_t bfloat16) { return as_float(uint32_t{bfloat16} << 16); }

}  // namespace mlspecqd
