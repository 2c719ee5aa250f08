// Floating-point numbers from their bits: bfloat16 and float16, which are stored, and float, in which everything is computed.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mlspecqd {

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widened(float value) { return value; }

inline float widened(Bf16 value) { return as_float(uint32_t{value.bits} << 16); }

// Subnormal float16 numbers are made of integers: threads read subnormal floats as zero (parallel.h).
inline float widened(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t{value.bits} >> 15 << 31;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return as_float(sign | (magnitude < 0x400u ? small : normal));
}

// The nearest number of a type, ties to even.
template <class T>
T narrowed(float value);

template <>
inline float narrowed<float>(float value) {
  return value;
}

template <>
inline Bf16 narrowed<Bf16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded)};
}

template <>
inline Half narrowed<Half>(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 31 << 15;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t small = bits_of(as_float(magnitude) + 0.5f) - 0x3f000000u;  // 0.5 has float16's least step as its last place
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace mlspecqd
