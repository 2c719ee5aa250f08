// Runs every product of the CPU kernels in buffers of exact length, to be built with sanitizers. No FFI: a pool of its own.

#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "products.h"

using namespace mlspecqd;

class Pool {
 public:
  explicit Pool(int threads) {
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
  std::vector<std::thread> threads_;
};

static void require(bool holds, const char* what, std::string_view isa, int64_t m, int64_t n, int64_t k) {
  if (holds) return;
  std::printf("%s, %.*s: M %ld, N %ld, K %ld\n", what, static_cast<int>(isa.size()), isa.data(), long(m), long(n), long(k));
  std::exit(1);
}

static void check(Pool& pool, int64_t m, int64_t n, int64_t k, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> x(m * k), w(n * k);
  for (auto* values : {&x, &w}) {
    for (auto& v : *values) v = static_cast<uint16_t>(0x3e80 + random() % 0x180 + (random() % 2 << 15));
  }
  for (const auto& choice : bf16_choices()) {
    if (!choice.supported) continue;
    std::vector<float> y(m * n, NAN);
    bf16_matmul(*choice.kernel, pool, x.data(), w.data(), y.data(), m, n, k);
    for (int64_t i = 0; i < m * n; ++i) {
      double expected = 0;
      for (int64_t j = 0; j < k; ++j) expected += double{widened(x[i / n * k + j])} * widened(w[i % n * k + j]);
      require(std::abs(y[i] - expected) < 1e-3, "bf16", choice.isa, m, n, k);
    }
  }
  const int64_t blocks = k / mxfp4::kBlock;
  std::vector<uint8_t> packed(n * blocks * 16), scales(n * blocks);
  std::vector<uint16_t> rows(m * blocks * mxfp4::kBlock);
  for (auto& p : packed) p = static_cast<uint8_t>(random());
  for (auto& s : scales) s = static_cast<uint8_t>(random() % 8 == 0 ? 0 : 120 + random() % 10);
  for (auto& v : rows) v = x[random() % x.size()];
  std::vector<std::vector<float>> results;
  for (const auto& choice : mxfp4_choices()) {
    if (!choice.supported) continue;
    auto& y = results.emplace_back(m * n, NAN);
    mxfp4_matmul(*choice.kernel, pool, rows.data(), packed.data(), scales.data(), y.data(), m, n, blocks * mxfp4::kBlock);
    for (int64_t i = 0; i < m * n; ++i) {
      require(std::abs(y[i] - results[0][i]) <= 3e-5 * k, "mxfp4", choice.isa, m, n, k);
    }
  }
}

int main() {
  Pool pool(3);
  const auto all = [&pool](unsigned seed) {
    for (int64_t m : {1, 2, 3, 4, 7, 8, 9, 19}) {
      for (int64_t n : {1, 3, 13, 29}) {
        for (int64_t k : {1, 31, 33, 96, 545, 1120}) check(pool, m, n, k, seed++);
      }
    }
    check(pool, 3, 700, 544, seed);  // large enough for the pool
  };
  std::thread other(all, 1000);
  all(0);
  other.join();
  std::puts("done");
}
