// What checks of the CPU kernels need: a pool of threads, numbers, windows some of whose rows are in use.

#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "floats.h"
#include "used.h"

using namespace mlspecqd;

class Pool {
 public:
  // Every `failing`th task finds no memory; none for 0.
  explicit Pool(int threads, int failing = 0) : failing_(failing) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (failing_ > 0 && ++asked_ % failing_ == 0) throw std::bad_alloc();
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool closing_ = false;
  int failing_, asked_ = 0;
  std::vector<std::thread> threads_;
};

inline void require(bool holds, const char* what, std::string_view isa, int64_t m, int64_t n, int64_t k) {
  if (holds) return;
  std::printf("%s, %.*s: M %ld, N %ld, K %ld\n", what, static_cast<int>(isa.size()), isa.data(), long(m), long(n), long(k));
  std::exit(1);
}

// How many rows of each of some windows to compute, which is any number, below 0 and beyond the window too.
inline std::vector<int32_t> some_used(int64_t windows, int64_t size, std::mt19937& random) {
  std::vector<int32_t> used(windows);
  for (auto& rows : used) rows = static_cast<int32_t>(random() % (size + 3)) - 1;
  return used;
}

// A product of M rows of x with a weight that is some experts', n / used.number rows each: a row has the bits of its expert's part
// of the whole result, and one that has no expert, or is not in use, is left as it is.
template <class Product>
void with_experts(const Product& product, const std::vector<float>& whole, const char* name, std::string_view isa, int64_t m,
                  int64_t n, int64_t k, std::mt19937& random) {
  for (const int64_t number : {int64_t{2}, int64_t{3}, n}) {
    if (number == 0 || n % number) continue;
    const int64_t each = n / number;
    std::vector<int32_t> experts(m);
    for (auto& expert : experts) expert = static_cast<int32_t>(random() % (number + 2)) - 1;
    const auto rows = some_used(1, m, random);
    const Used used = {rows.data(), 1, experts.data(), number};
    constexpr float kLeft = 12345;
    std::vector<float> y(m * each, kLeft);
    product(y.data(), used);
    for (int64_t i = 0; i < m * each; ++i) {
      const int64_t row = i / each, expert = experts[row];
      const bool computed = row < used.of(0, m) && expert >= 0 && expert < number;
      const float expected = computed ? whole[row * n + expert * each + i % each] : kLeft;
      require(y[i] == expected, name, isa, m, n, k);
    }
  }
}

// A product of M rows of x that are windows, and with some of their rows in use: those have the same bits, the others are left as
// they are. The result with all rows.
template <class Product>
std::vector<float> with_some_rows(const Product& product, const char* name, std::string_view isa, int64_t m, int64_t n, int64_t k) {
  std::vector<float> whole(m * n, NAN);
  product(whole.data(), Used{});
  std::mt19937 random(static_cast<unsigned>(m * 31 + n + k));
  for (const int64_t windows : {m, m % 3 ? int64_t{1} : m / 3}) {
    const int64_t size = m / windows;
    const auto rows = some_used(windows, size, random);
    const Used used = {rows.data(), windows};
    constexpr float kLeft = 12345;
    std::vector<float> y(m * n, kLeft);
    product(y.data(), used);
    for (int64_t i = 0; i < m * n; ++i) {
      const bool computed = i / n % size < used.of(i / n / size, size);
      require(y[i] == (computed ? whole[i] : kLeft), name, isa, m, n, k);
    }
  }
  with_experts(product, whole, name, isa, m, n, k, random);
  return whole;
}

// Numbers of both signs whose magnitudes are from 0.25 to 0.5.
template <class Element>
std::vector<Element> numbers(int64_t count, std::mt19937& random) {
  std::vector<Element> values(count);
  for (auto& v : values) v = narrowed<Element>((0.25f + static_cast<float>(random() % 256) / 1024) * (random() % 2 ? 1 : -1));
  return values;
}
