// The products over plain pointers, and which instruction sets this processor has.
//
// Of x [M, K] the rows in use are multiplied, into out [M, N]; the other rows of out are left as they are.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "attention.h"
#include "blocked.h"
#include "dense.h"
#include "four_bits.h"
#include "four_bits_avx2.h"
#include "four_bits_avx512.h"
#include "int8_x86.h"
#include "mx8.h"
#include "norm.h"
#include "parallel.h"
#include "rotary.h"
#include "scratch.h"
#include "six_bits.h"
#include "six_bits_avx2.h"
#include "six_bits_avx512.h"
#include "used.h"

#if defined(MLSPECQD_X86)
#include <cpuid.h>
#endif

namespace mlspecqd {

template <class Kernel>
struct Choice {
  std::string_view isa;
  const Kernel* kernel;
  bool supported;
};

#if defined(MLSPECQD_X86)
// Clang before 16 knows no "f16c" here.
inline bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

// The kernels of a product that has one for each of three instruction sets, the best first.
#if defined(MLSPECQD_X86)
template <class Kernel>
std::array<Choice<Kernel>, 3> three_choices(const Kernel& avx512, const Kernel& avx2, const Kernel& portable) {
  return {{{"avx512", &avx512, has_avx512()}, {"avx2", &avx2, has_avx2()}, {"portable", &portable, true}}};
}
#define MLSPECQD_THREE(product, ...) product::avx512::__VA_ARGS__, product::avx2::__VA_ARGS__, product::portable::__VA_ARGS__
#else
template <class Kernel>
std::array<Choice<Kernel>, 1> three_choices(const Kernel& portable) {
  return {{{"portable", &portable, true}}};
}
#define MLSPECQD_THREE(product, ...) product::portable::__VA_ARGS__
#endif

// Instruction sets by name, the best first. Intel's bfloat16 instruction has half the throughput of two f32 multiply-adds, AMD's
// twice (Sapphire Rapids: one every two cycles against two a cycle), so it leads on AMD alone.
template <class Element>
const auto& dense_choices();

template <>
inline const auto& dense_choices<Bf16>() {
#if defined(MLSPECQD_X86)
  static const auto choices = [] {
    const bool bf16 = has_avx512() && __builtin_cpu_supports("avx512bf16");
    std::array<Choice<dense::Kernel>, 4> all = {{
        {"avx512bf16", &dense::avx512bf16::bf16::kernel, bf16},
        {"avx512", &dense::avx512::bf16::kernel, has_avx512()},
        {"avx2", &dense::avx2::bf16::kernel, has_avx2()},
        {"portable", &dense::portable::bf16::kernel, true},
    }};
    if (!__builtin_cpu_is("amd")) std::swap(all[0], all[1]);
    return all;
  }();
#else
  static constexpr std::array<Choice<dense::Kernel>, 1> choices = {{{"portable", &dense::portable::bf16::kernel, true}}};
#endif
  return choices;
}

template <>
inline const auto& dense_choices<Half>() {
  static const auto choices = three_choices(MLSPECQD_THREE(dense, f16::kernel));
  return choices;
}

template <>
inline const auto& dense_choices<float>() {
  static const auto choices = three_choices(MLSPECQD_THREE(dense, f32::kernel));
  return choices;
}

// For kernels of integers: AVX-512 with its products of bytes, AVX2, and the portable form.
#if defined(MLSPECQD_X86)
template <class Kernel>
std::array<Choice<Kernel>, 3> choices_of_bytes(const Kernel& avx512vnni, const Kernel& avx2, const Kernel& portable) {
  const bool vnni = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return {{{"avx512vnni", &avx512vnni, vnni}, {"avx2", &avx2, has_avx2()}, {"portable", &portable, true}}};
}
#define MLSPECQD_THREE_OF_BYTES(product, ...) \
  product::avx512vnni::__VA_ARGS__, product::avx2::__VA_ARGS__, product::portable::__VA_ARGS__
#else
template <class Kernel>
std::array<Choice<Kernel>, 1> choices_of_bytes(const Kernel& portable) {
  return {{{"portable", &portable, true}}};
}
#define MLSPECQD_THREE_OF_BYTES(product, ...) product::portable::__VA_ARGS__
#endif

template <class Form>
const auto& four_bits_choices() {
  static const auto choices = choices_of_bytes<four_bits::Kernel>(MLSPECQD_THREE_OF_BYTES(four_bits, kernel<Form>));
  return choices;
}

template <class Form>
const auto& six_bits_choices() {
  static const auto choices = choices_of_bytes<six_bits::Kernel>(MLSPECQD_THREE_OF_BYTES(six_bits, kernel<Form>));
  return choices;
}

template <class Form>
const auto& int8_choices() {
  static const auto choices = choices_of_bytes<int8::Kernel>(MLSPECQD_THREE_OF_BYTES(int8, kernel<Form>));
  return choices;
}

inline const auto& mx8_choices() {
  static const auto choices = three_choices(MLSPECQD_THREE(mx8, kernel));
  return choices;
}

template <class Element>
const auto& attention_choices() {
  static const auto choices = three_choices(MLSPECQD_THREE(attention, kernel<Element>));
  return choices;
}

template <class Element>
const auto& norm_choices() {
  static const auto choices = three_choices<norm::Row<Element>>(MLSPECQD_THREE(norm, row_of<Element>));
  return choices;
}

// The kernel of this name, or the best for an empty one; nullptr if this processor cannot run it.
template <class Choices>
auto choose(const Choices& choices, std::string_view isa) -> decltype(choices[0].kernel) {
  for (const auto& choice : choices) {
    if (choice.supported && (isa.empty() || choice.isa == isa)) return choice.kernel;
  }
  return nullptr;
}

template <class Element, class Pool>
void dense_matmul(const dense::Kernel& kernel, Pool& pool, const Element* x, const Element* w, float* out, int64_t m, int64_t n,
                  int64_t k, Used used = {}) {
  const int64_t prepared = rounded_up(k, kernel.step) * kernel.activation_bytes;
  blocked(
      pool, x, used, out, m, n, k, sizeof(Element) * k, kernel.rows, prepared,
      [&](const Element* from, int rows, char* block) { kernel.prepare(from, rows, k, block); },
      [&](const char* block, int rows, int64_t begin, int64_t end, float* to, int64_t stride) {
        kernel.product(block, rows, w, k, begin, end, to, stride);
      });
}

// Of a weight whose codes have so many bits, with a kernel for it.
template <int bits, class Pool>
void packed_matmul(const four_bits::Kernel& kernel, Pool& pool, const uint16_t* x, const four_bits::Weight& w, float* out,
                   int64_t m, int64_t n, int64_t k, Used used) {
  const int64_t prepared = (k + kernel.group - 1) / kernel.group * kernel.group_bytes;
  blocked(
      pool, x, used, out, m, n, k, k * bits / 8, kernel.rows, prepared,
      [&](const uint16_t* from, int rows, char* block) { kernel.prepare(from, rows, k, block); },
      [&](const char* block, int rows, int64_t begin, int64_t end, float* to, int64_t stride) {
        kernel.product(block, rows, w, k, begin, end, to, stride);
      });
}

template <class Pool>
void four_bits_matmul(const four_bits::Kernel& kernel, Pool& pool, const uint16_t* x, const four_bits::Weight& w, float* out,
                      int64_t m, int64_t n, int64_t k, Used used = {}) {
  packed_matmul<4>(kernel, pool, x, w, out, m, n, k, used);
}

template <class Pool>
void six_bits_matmul(const four_bits::Kernel& kernel, Pool& pool, const uint16_t* x, const four_bits::Weight& w, float* out,
                     int64_t m, int64_t n, int64_t k, Used used = {}) {
  packed_matmul<6>(kernel, pool, x, w, out, m, n, k, used);
}

template <class Pool>
void int8_matmul(const int8::Kernel& kernel, Pool& pool, const uint16_t* x, const int8::Weight& w, float* out, int64_t m, int64_t n,
                 int64_t k, Used used = {}) {
  const int64_t prepared = (k + kernel.step - 1) / kernel.step * kernel.step_bytes;
  blocked(
      pool, x, used, out, m, n, k, k, kernel.rows, prepared,
      [&](const uint16_t* from, int rows, char* block) { kernel.prepare(from, rows, k, block); },
      [&](const char* block, int rows, int64_t begin, int64_t end, float* to, int64_t stride) {
        kernel.product(block, rows, w, k, begin, end, to, stride);
      });
}

template <class Pool>
void mx8_matmul(const mx8::Kernel& kernel, Pool& pool, mx8::Format format, const uint16_t* x, const uint8_t* codes,
                const uint8_t* scales, float* out, int64_t m, int64_t n, int64_t k, Used used = {}) {
  const int64_t prepared = k * static_cast<int64_t>(sizeof(float));
  blocked(
      pool, x, used, out, m, n, k, k, kernel.rows, prepared,
      [&](const uint16_t* from, int rows, char* block) { kernel.prepare(from, rows, k, reinterpret_cast<float*>(block)); },
      [&](const char* block, int rows, int64_t begin, int64_t end, float* to, int64_t stride) {
        kernel.product(reinterpret_cast<const float*>(block), rows, format, codes, scales, k, begin, end, to, stride);
      });
}

}  // namespace mlspecqd
