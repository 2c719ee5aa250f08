// Memory for the time of a call, aligned to a register.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mlspecqd {

constexpr int64_t kAlignment = 64;  // bytes

// The least multiple of `step` that is not below `value`.
constexpr int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

using Scratch = std::unique_ptr<char, decltype(&std::free)>;

// Room for so many bytes, or none for 0; throws std::bad_alloc.
inline Scratch scratch(int64_t bytes) {
  if (bytes == 0) return {nullptr, &std::free};
  Scratch memory(static_cast<char*>(std::aligned_alloc(kAlignment, rounded_up(bytes, kAlignment))), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace mlspecqd
