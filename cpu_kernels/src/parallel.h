// for_each_chunk: a loop over independent chunks of work, on the calling thread and on a thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

#include "scratch.h"
#include "target.h"

namespace mlspecqd {

// Rounds results below the least normal number to zero and reads such numbers as zero, as long as it lives. Threads of a pool and
// threads of Python come with different settings, and a result must not depend on the thread that made it.
class [[maybe_unused]] FlushSubnormals {
 public:
#if defined(MLSPECQD_X86)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & ~kRounding) | kFlushToZero | kDenormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6, kRounding = 3u << 13;
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"((saved_ & ~kRounding) | kFlushToZero));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  static constexpr uint64_t kFlushToZero = 1u << 24, kRounding = 3u << 22;
  uint64_t saved_;
#endif
};

inline void pause() {
#if defined(MLSPECQD_X86)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls body(chunk, memory) for every chunk in [0, chunks) and returns when all are done; `memory` is room for `bytes`, aligned to
// a register, that no other thread has meanwhile.
//
// Every participant takes the next chunk from one counter, so the caller can do all of them alone: it never waits for a task that
// has not begun, only for chunks that another thread is in the middle of. A task that the pool runs late finds no chunk left; the
// counters outlive the call for it, the body and the memory do not.
//
// Throws std::bad_alloc before anything has begun, and never later: nothing catches what leaves a task of a pool, and the body must
// not be gone while tasks run.
template <class Pool, class Body>
void for_each_chunk(Pool& pool, int64_t chunks, int64_t bytes, const Body& body) {
  static_assert(std::is_nothrow_invocable_v<const Body&, int64_t, char*>, "nothing catches what a task of a pool throws");
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  const auto work = [chunks](Shared& shared, const Body* call, char* memory) noexcept {
    FlushSubnormals flush;
    for (int64_t chunk; (chunk = shared.next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      (*call)(chunk, memory);
      shared.done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = chunks > 1 ? std::min<int64_t>(pool.num_threads(), chunks) - 1 : 0;
  const int64_t each = rounded_up(bytes, kAlignment);
  const Scratch memory = scratch((helpers + 1) * each);
  const auto shared = std::make_shared<Shared>();
  try {
    for (int64_t i = 1; i <= helpers; ++i) {
      pool.Schedule([shared, work, call = &body, own = memory.get() + i * each]() noexcept { work(*shared, call, own); });
    }
  } catch (...) {
    // A task that cannot be made is done without.
  }
  work(*shared, &body, memory.get());
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();  // the other thread has lost its core
    }
  }
}

}  // namespace mlspecqd
