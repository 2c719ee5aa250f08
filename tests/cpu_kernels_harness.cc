// Runs every product of the CPU kernels in buffers of exact length, to be built with sanitizers. No FFI: a pool of its own.

#include "cpu_kernels_harness.h"

#include "products.h"
#include "put_window.h"

template <class Element>
static void check_dense(Pool& pool, int64_t m, int64_t n, int64_t k, std::mt19937& random) {
  const auto x = numbers<Element>(m * k, random), w = numbers<Element>(n * k, random);
  for (const auto& choice : dense_choices<Element>()) {
    if (!choice.supported) continue;
    const auto product = [&](float* out, Used used) {
      dense_matmul(*choice.kernel, pool, x.data(), w.data(), out, m, n / used.number, k, used);
    };
    const auto y = with_some_rows(product, "matmul, rows", choice.isa, m, n, k);
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
    const Element* const bias = centered ? w.data() : nullptr;
    norm::norm(*choice.kernel, pool, x.data(), w.data(), bias, {1e-5f, offset, centered}, y.data(), m, k);
    const auto rows = some_used(m, 1, random);
    std::vector<Element> some(m * k, narrowed<Element>(12345));
    norm::norm(*choice.kernel, pool, x.data(), w.data(), bias, {1e-5f, offset, centered}, some.data(), m, k, {rows.data(), m});
    for (int64_t i = 0; i < m * k; ++i) {
      const Element expected = rows[i / k] > 0 ? y[i] : narrowed<Element>(12345);
      require(widened(some[i]) == widened(expected), "norm, rows", choice.isa, m, n, k);
    }
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
  product(*choices.back().kernel, expected.data(), Used{});
  for (const auto& choice : choices) {
    if (!choice.supported) continue;
    const auto y = with_some_rows([&](float* out, Used used) { product(*choice.kernel, out, used); }, name, choice.isa, m, n, k);
    for (int64_t i = 0; i < m * n; ++i) require(std::abs(y[i] - expected[i]) <= each * k, name, choice.isa, m, n, k);
  }
}

template <class Form>
static void check_six(Pool& pool, const char* name, four_bits::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                      int64_t k) {
  const auto product = [&](const six_bits::Kernel& kernel, float* y, Used used) {
    six_bits_matmul(kernel, pool, x.data(), w, y, m, n / used.number, k, used);
  };
  same(six_bits_choices<Form>(), name, product, m, n, k, 2e-4);
}

template <class Form>
static void check_form(Pool& pool, const char* name, four_bits::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                       int64_t k) {
  const auto product = [&](const four_bits::Kernel& kernel, float* y, Used used) {
    four_bits_matmul(kernel, pool, x.data(), w, y, m, n / used.number, k, used);
  };
  same(four_bits_choices<Form>(), name, product, m, n, k, 3e-5);
}

template <class Form>
static void check_eight(Pool& pool, const char* name, int8::Weight w, const std::vector<uint16_t>& x, int64_t m, int64_t n,
                        int64_t k) {
  const auto product = [&](const int8::Kernel& kernel, float* y, Used used) {
    int8_matmul(kernel, pool, x.data(), w, y, m, n / used.number, k, used);
  };
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
      const auto product = [&](float* out, Used used) {
        mx8_matmul(*choice.kernel, pool, f, x.data(), codes.data(), scales.data(), out, m, n / used.number, k, used);
      };
      const auto y = with_some_rows(product, "mx8, rows", choice.isa, m, n, k);
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
  const auto rows = seed % 4 ? some_used(s.batch, s.window, random) : std::vector<int32_t>(s.batch, int32_t(s.window));
  const Used used = {rows.data(), s.batch};
  put_window(reinterpret_cast<char*>(k.data()), start.data(), reinterpret_cast<const char*>(more.data()), s.batch, s.kv_heads,
             s.slots, s.window, depth * static_cast<int64_t>(sizeof(Element)), used);
  for (const auto& choice : attention_choices<Element>()) {
    if (!choice.supported) continue;
    std::vector<float> y(s.batch * s.heads * s.window * value_depth, NAN);
    attention::attention(*choice.kernel, pool, q.data(), k.data(), v.data(), first.data(), last.data(), sinks.data(), y.data(),
                         scores, s, used);
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
        if (w >= used.of(b, s.window)) {
          require(std::isnan(found), "attention, rows", choice.isa, row, s.slots, depth);
          continue;
        }
        require(std::abs(found - expected[d] / total) < 1e-4, "attention", choice.isa, row, s.slots, depth);
      }
    }
  }
}

// Against the definition, position by position.
static void check_rotate(Pool& pool, int64_t batch, int64_t window, int64_t heads, int64_t half, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t depth = 2 * half, rows = batch * window;
  const auto x = numbers<float>(rows * heads * depth, random), cos = numbers<float>(rows * half, random);
  const auto sin = numbers<float>(rows * half, random);
  const auto in_use = some_used(batch, window, random);
  const Used used = {in_use.data(), batch};
  std::vector<float> y(rows * heads * depth, NAN);
  rotary::rotate(pool, x.data(), cos.data(), sin.data(), y.data(), batch, window, heads, depth, used);
  for (int64_t i = 0; i < rows * heads * half; ++i) {
    const int64_t d = i % half, h = i / half % heads, row = i / half / heads, w = row % window, b = row / window;
    const float* const from = x.data() + (row * heads + h) * depth + d;
    const float* const to = y.data() + ((b * heads + h) * window + w) * depth + d;
    if (w >= used.of(b, window)) {
      require(std::isnan(to[0]) && std::isnan(to[half]), "rotate, rows", "", rows, heads, depth);
      continue;
    }
    const float c = cos[row * half + d], s = sin[row * half + d];
    const bool first = std::abs(to[0] - (double{from[0]} * c - double{from[half]} * s)) < 1e-6;
    const bool second = std::abs(to[half] - (double{from[half]} * c + double{from[0]} * s)) < 1e-6;
    require(first && second, "rotate", "", rows, heads, depth);
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
    for (int64_t window : {1, 5, 18}) check_rotate(pool, 3, window, 40, 32, seed++);
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
