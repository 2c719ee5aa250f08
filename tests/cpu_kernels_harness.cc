// Runs every product of the CPU kernels in buffers of exact length, to be built with sanitizers. No FFI: a pool of its own.

#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "products.h"
#include "put_window.h"

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

static void require(bool holds, const char* what, std::string_view isa, int64_t m, int64_t n, int64_t k) {
  if (holds) return;
  std::printf("%s, %.*s: M %ld, N %ld, K %ld\n", what, static_cast<int>(isa.size()), isa.data(), long(m), long(n), long(k));
  std::exit(1);
}

// Numbers of both signs whose magnitudes are from 0.25 to 0.5.
template <class Element>
static std::vector<Element> numbers(int64_t count, std::mt19937& random) {
  std::vector<Element> values(count);
  for (auto& v : values) v = narrowed<Element>((0.25f + static_cast<float>(random() % 256) / 1024) * (random() % 2 ? 1 : -1));
  return values;
}

template <class Element>
static void check_dense(Pool& pool, int64_t m, int64_t n, int64_t k, std::mt19937& random) {
  const auto x = numbers<Element>(m * k, random), w = numbers<Element>(n * k, random);
  for (const auto& choice : dense_choices<Element>()) {
    if (!choice.supported) continue;
    std::vector<float> y(m * n, NAN);
    dense_matmul(*choice.kernel, pool, x.data(), w.data(), y.data(), m, n, k);
    for (int64_t i = 0; i < m * n; ++i) {
      double expected = 0;
      for (int64_t j = 0; j < k; ++j) expected += double{widened(x[i / n * k + j])} * widened(w[i % n * k + j]);
      require(std::abs(y[i] - expected) < 1e-3, "matmul", choice.isa, m, n, k);
    }
  }
  for (const auto& choice : norm_choices<Element>()) {
    if (!choice.supported) continue;
    std::vector<Element> y(m * k);
    const float offset = m % 2 ? 1.0f : -0.0f;
    const bool centered = m % 3 == 0;
    norm::norm(*choice.kernel, pool, x.data(), w.data(), centered ? w.data() : nullptr, {1e-5f, offset, centered}, y.data(), m, k);
    for (int64_t row = 0; row < m; ++row) {
      double mean = 0, squares = 0;
      for (int64_t j = 0; centered && j < k; ++j) mean += double{widened(x[row * k + j])} / k;
      for (int64_t j = 0; j < k; ++j) squares += (widened(x[row * k + j]) - mean) * (widened(x[row * k + j]) - mean);
      for (int64_t j = 0; j < k; ++j) {
        const double scaled = (widened(x[row * k + j]) - mean) / std::sqrt(squares / k + 1e-5) * (double{offset} + widened(w[j]));
        const double expected = scaled + (centered ? widened(w[j]) : 0);
        require(std::abs(widened(y[row * k + j]) - expected) < 4e-3 * (1 + std::abs(expected)), "norm", choice.isa, m, n, k);
      }
    }
  }
}

static void check(Pool& pool, int64_t m, int64_t n, int64_t k, unsigned seed) {
  std::mt19937 random(seed);
  check_dense<Bf16>(pool, m, n, k, random);
  check_dense<Half>(pool, m, n, k, random);
  check_dense<float>(pool, m, n, k, random);
}

static std::vector<uint8_t> bytes(int64_t count, std::mt19937& random) {
  std::vector<uint8_t> out(count);
  for (auto& byte : out) byte = static_cast<uint8_t>(random());
  return out;
}

// Numbers of magnitude 0.25 to 1, as the bits of bfloat16 (0x3e80 and 0x180 more) or float16 (0x3400 and 0x800 more).
static std::vector<uint16_t> shorts(int64_t count, unsigned first, unsigned more, std::mt19937& random) {
  std::vector<uint16_t> out(count);
  for (auto& v : out) v = static_cast<uint16_t>(first + random() % more + (random() % 2 << 15));
  return out;
}

// Every instruction set's result is the portable one's, up to what sums in another order may differ by.
template <class Choices, class Product>
static void same(const Choices& choices, const char* name, const Product& product, int64_t m, int64_t n, int64_t k, double each) {
  std::vector<float> expected(m * n, NAN);
  product(*choices.back().kernel, expected.data());
  for (const auto& choice : choices) {
    if (!choice.supported) continue;
    std::vector<float> y(m * n, NAN);
    product(*choice.kernel, y.data());
    for (int64_t i = 0; i < m * n; ++i) require(std::abs(y[i] - expected[i]) <= each * k, name, choice.isa, m, n, k);
  }
}

template <class Form>
static void check_six(Pool& pool, const char* name, four_bits::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                      int64_t k) {
  const auto product = [&](const six_bits::Kernel& kernel, float* y) { six_bits_matmul(kernel, pool, x.data(), w, y, m, n, k); };
  same(six_bits_choices<Form>(), name, product, m, n, k, 2e-4);
}

template <class Form>
static void check_form(Pool& pool, const char* name, four_bits::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                       int64_t k) {
  const auto product = [&](const four_bits::Kernel& kernel, float* y) { four_bits_matmul(kernel, pool, x.data(), w, y, m, n, k); };
  same(four_bits_choices<Form>(), name, product, m, n, k, 3e-5);
}

template <class Form>
static void check_eight(Pool& pool, const char* name, int8::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                        int64_t k) {
  const auto product = [&](const int8::Kernel& kernel, float* y) { int8_matmul(kernel, pool, x.data(), w, y, m, n, k); };
  same(int8_choices<Form>(), name, product, m, n, k, 3e-5);
}

// Arrays end where they must: what reads beyond them is seen by the sanitizers.
static void check_quantized(Pool& pool, int64_t m, int64_t n, int64_t blocks, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t k = blocks * four_bits::kBlock;
  const auto x = shorts(m * k, 0x3e80, 0x180, random);
  const auto packed = bytes(n * k / 2, random), six = bytes(n * k / 4 * 3, random), codes = bytes(n * k, random);
  std::vector<uint8_t> e8m0(n * blocks), e4m3(2 * n * blocks);
  for (auto& s : e8m0) s = static_cast<uint8_t>(random() % 8 == 0 ? 0 : 120 + random() % 10);
  for (auto& s : e4m3) s = static_cast<uint8_t>(random() % 0x40);
  check_form<four_bits::Mxfp4>(pool, "mxfp4", {packed.data(), e8m0.data(), nullptr, n, 1}, x, m, n, k);
  check_form<four_bits::Nvfp4>(pool, "nvfp4", {packed.data(), e4m3.data(), nullptr, n, 1}, x, m, n, k);
  check_six<six_bits::E2m3>(pool, "e2m3", {six.data(), e8m0.data(), nullptr, n, 1}, x, m, n, k);
  check_six<six_bits::E3m2>(pool, "e3m2", {six.data(), e8m0.data(), nullptr, n, 1}, x, m, n, k);
  for (const int64_t each : {1, 2, 4, 16}) {
    const int64_t groups = (blocks + each - 1) / each;
    const auto scales = shorts(n * groups, 0x3400, 0x800, random), minima = shorts(n * groups, 0x3400, 0x800, random);
    check_form<four_bits::Int4>(pool, "int4", {packed.data(), scales.data(), nullptr, n, each}, x, m, n, k);
    check_form<four_bits::Uint4>(pool, "uint4", {packed.data(), scales.data(), minima.data(), n, each}, x, m, n, k);
  }
  std::vector<float> of_rows(n);
  for (auto& s : of_rows) s = static_cast<float>(random() % 100) * 1e-4f;
  check_eight<int8::Rows>(pool, "int8", {codes.data(), of_rows.data(), nullptr, n, 0}, x, m, n, k);
  for (const int shift : {0, 1, 2, 5}) {
    const int64_t groups = (2 * blocks + (1 << shift) - 1) >> shift;
    const auto scales = shorts(n * groups, 0x1400, 0x800, random), minima = shorts(n * groups, 0x3400, 0x800, random);
    check_eight<int8::Groups>(pool, "int8 groups", {codes.data(), scales.data(), nullptr, n, shift}, x, m, n, k);
    check_eight<int8::Unsigned>(pool, "uint8", {codes.data(), scales.data(), minima.data(), n, shift}, x, m, n, k);
  }
}

static double decoded(mx8::Format f, uint8_t code, uint8_t scale) {
  const int sign = code >> (f.bits() - 1), exponent = code >> f.mantissa_bits & ((1 << f.exponent_bits) - 1);
  const int fraction = code & ((1 << f.mantissa_bits) - 1), least = 1 - f.bias() - f.mantissa_bits;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, least) : std::ldexp((1 << f.mantissa_bits) + fraction, least + exponent - 1);
  return scale == 0 ? 0 : std::ldexp(sign ? -magnitude : magnitude, scale - 127);
}

static void check_mx8(Pool& pool, int64_t m, int64_t n, int64_t blocks, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t k = blocks * mx8::kBlock;
  std::vector<uint16_t> x(m * k);
  std::vector<uint8_t> codes(n * k), scales(n * blocks);
  for (auto& v : x) v = static_cast<uint16_t>(0x3e80 + random() % 0x180 + (random() % 2 << 15));
  for (auto& s : scales) s = static_cast<uint8_t>(random() % 8 == 0 ? 0 : 120 + random() % 10);
  for (const mx8::Format f : {mx8::Format{4, 3}, mx8::Format{5, 2}}) {
    for (auto& c : codes) {
      c = static_cast<uint8_t>(random() % (1 << f.bits()));
      if (f.exponent_bits == 5 && (c & 0x7c) == 0x7c) c &= 0x83;  // infinity, NaN
    }
    for (const auto& choice : mx8_choices()) {
      if (!choice.supported) continue;
      std::vector<float> y(m * n, NAN);
      mx8_matmul(*choice.kernel, pool, f, x.data(), codes.data(), scales.data(), y.data(), m, n, k);
      for (int64_t i = 0; i < m * n; ++i) {
        double expected = 0, terms = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double term =
              widened(Bf16{x[i / n * k + j]}) * decoded(f, codes[i % n * k + j], scales[(i % n * k + j) / mx8::kBlock]);
          expected += term, terms += std::abs(term);
        }
        require(std::abs(y[i] - expected) <= 1e-6 * terms, "mx8", choice.isa, m, n, k);
      }
    }
  }
}

// Every row of a causal window over a cache of exact length, against the definition; the window is written to the cache first.
template <class Element>
static void check_attention(Pool& pool, const attention::Shape& s, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t cached = s.batch * s.kv_heads * s.slots;
  const auto [depth, value_depth] = s.depth;
  const attention::Scores scores = {seed % 2 ? 0.3f : 1 / std::sqrt(static_cast<float>(depth)), seed % 3 ? 0.0f : 2.5f};
  const auto q = numbers<Element>(s.batch * s.heads * s.window * depth, random), v = numbers<Element>(cached * value_depth, random);
  auto k = numbers<Element>(cached * depth, random);
  const auto more = numbers<Element>(s.batch * s.kv_heads * s.window * depth, random);
  auto sinks = numbers<float>(s.heads, random);
  sinks[0] = -INFINITY;
  std::vector<int32_t> start(s.batch), first(s.batch * s.window), last(first);
  for (int64_t b = 0; b < s.batch; ++b) start[b] = static_cast<int32_t>(random() % (s.slots + 2)) - 1;
  for (size_t i = 0; i < last.size(); ++i) last[i] = static_cast<int32_t>(random() % (s.slots + 1)), first[i] = last[i] / 3 - 1;
  put_window(reinterpret_cast<char*>(k.data()), start.data(), reinterpret_cast<const char*>(more.data()), s.batch, s.kv_heads,
             s.slots, s.window, depth * static_cast<int64_t>(sizeof(Element)));
  for (const auto& choice : attention_choices<Element>()) {
    if (!choice.supported) continue;
    std::vector<float> y(s.batch * s.heads * s.window * value_depth, NAN);
    attention::attention(*choice.kernel, pool, q.data(), k.data(), v.data(), first.data(), last.data(), sinks.data(), y.data(),
                         scores, s);
    for (int64_t row = 0; row < s.batch * s.heads * s.window; ++row) {
      const int64_t w = row % s.window, h = row / s.window % s.heads, b = row / s.window / s.heads;
      const int64_t head = b * s.kv_heads + h / (s.heads / s.kv_heads), at = b * s.window + w;
      std::vector<double> expected(value_depth);
      double total = std::exp(double{sinks[h]});
      for (int64_t slot = std::max(first[at], 0); slot <= std::min<int64_t>(last[at], s.slots - 1); ++slot) {
        double score = 0;
        for (int64_t d = 0; d < depth; ++d) {
          score += double{widened(q[row * depth + d])} * widened(k[(head * s.slots + slot) * depth + d]);
        }
        score *= scores.scale;
        const double weight = std::exp(scores.cap > 0 ? scores.cap * std::tanh(score / scores.cap) : score);
        for (int64_t d = 0; d < value_depth; ++d) expected[d] += weight * widened(v[(head * s.slots + slot) * value_depth + d]);
        total += weight;
      }
      for (int64_t d = 0; d < value_depth; ++d) {
        const float found = y[((b * s.window + w) * s.heads + h) * value_depth + d];
        require(std::abs(found - expected[d] / total) < 1e-4, "attention", choice.isa, row, s.slots, depth);
      }
    }
  }
}

int main() {
  Pool pool(3), failing(3, 2);
  const auto all = [&pool, &failing](unsigned seed) {
    for (int64_t m : {1, 2, 3, 4, 7, 8, 9, 19}) {
      for (int64_t n : {1, 3, 13, 29}) {
        for (int64_t k : {1, 31, 33, 96, 545, 1120}) check(pool, m, n, k, seed++);
      }
    }
    check(pool, 3, 700, 544, seed);  // large enough for the pool
    check(failing, 3, 700, 544, seed);
    for (int64_t m : {1, 2, 3, 4, 7, 8, 9, 19}) {
      for (int64_t n : {1, 3, 13}) {
        for (int64_t blocks : {1, 2, 5}) check_mx8(pool, m, n, blocks, seed++);
        for (int64_t blocks : {1, 3, 17, 35}) check_quantized(pool, m, n, blocks, seed++);
      }
    }
    check_mx8(pool, 3, 700, 17, seed);
    check_quantized(pool, 3, 700, 17, seed);
    check_quantized(failing, 3, 700, 17, seed);
    check_attention<float>(failing, {2, 6, 3, 18, 77, {20, 12}}, seed);
    for (int64_t slots : {1, 31, 32, 77}) {
      for (int64_t window : {1, 5, 18}) {
        for (int64_t depth : {1, 8, 20}) {
          check_attention<Bf16>(pool, {2, 6, 3, window, slots, {depth, depth + 3 * (slots % 2)}}, seed++);
          check_attention<Half>(pool, {2, 6, 3, window, slots, {depth, depth + 3 * (slots % 2)}}, seed);
          check_attention<float>(pool, {2, 6, 3, window, slots, {depth, depth + 3 * (slots % 2)}}, seed);
        }
      }
    }
  };
  std::thread other(all, 1000);
  all(0);
  other.join();
  std::puts("done");
}
