// Memory for the time of a call, aligned to a register.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mlspecqd {

using Scratch = std::unique_ptr<char, decltype(&std::free)>;

inline Scratch scratch(int64_t bytes) {
  Scratch memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64)), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace mlspecqd
