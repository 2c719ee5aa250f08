// int8_matmul: x [M, K] bfloat16 by w [N, K] of integers in bytes, their codes less 128, times a scale for each row, to f32 [M, N],
// K a multiple of 32, once for each instruction set.
//
// Activations are rounded to eight bits by blocks of 32, as in four_bits.h: x is taken for q * a/127, and
//   y[m, n] = (sum over blocks of (sum of e q) * a/127) * scale[n].
// The sum over a block is one of integers, exact in any order. The sum over blocks is one accumulator's, in order, and its lanes
// are added in one order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "four_bits.h"
#include "registers.h"
#include "target.h"

namespace mlspecqd::int8 {

constexpr int kBlock = four_bits::kBlock, kOffset = 128;
constexpr int64_t kNear = 512;  // bytes

// One instruction set's product: rows of x are prepared in blocks of up to `rows`, each of `step_bytes` for every `step` elements
// of K, rounded up; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t step;
  int64_t step_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const uint8_t* codes, const float* scales, int64_t k, int64_t begin, int64_t end,
                  float* out, int64_t stride);
};

// The integers of a block of x in order, their sum, and the factor back.
struct Block {
  int8_t elements[kBlock];
  float factor;
};

inline Block rounded(const uint16_t* x) {
  four_bits::portable::Block halves;
  four_bits::portable::prepare_block(x, 1, &halves);
  Block block;
  for (int i = 0; i < kBlock; ++i) block.elements[i] = static_cast<int8_t>(halves.elements[i % 2 * (kBlock / 2) + i / 2]);
  block.factor = halves.factor;
  return block;
}

namespace portable {

constexpr int kStep = kBlock, kRows = 4;

struct Step {
  int16_t elements[kBlock];
  float factor;
};

inline void prepare_step(const uint16_t* x, int, Step* step) {
  const Block block = rounded(x);
  std::copy(block.elements, block.elements + kBlock, step->elements);
  step->factor = block.factor;
}

template <int MT>
void columns(const Step* x, const uint8_t* codes, const float* scales, int64_t k, int64_t begin, int64_t end, float* out,
             int64_t stride) {
  for (int64_t n = begin; n < end; ++n) {
    float sums[MT] = {};
    const Step* step = x;
    for (int64_t at = 0; at < k; at += kBlock, step += MT) {
      int16_t w[kBlock];
      for (int i = 0; i < kBlock; ++i) w[i] = static_cast<int16_t>(codes[n * k + at + i] - kOffset);
      for (int m = 0; m < MT; ++m) {
        int32_t total = 0;
        for (int i = 0; i < kBlock; ++i) total += int32_t{w[i]} * step[m].elements[i];
        sums[m] += static_cast<float>(total) * step[m].factor;
      }
    }
    for (int m = 0; m < MT; ++m) out[m * stride + n] = sums[m] * scales[n];
  }
}

}  // namespace portable

#if defined(MLSPECQD_X86)

namespace avx512vnni {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))

constexpr int kStep = 2 * kBlock, kLanes = 16, kRows = 8;

// Two blocks, in order; of each lane's four elements the sum's starting value; the factor of its block.
struct alignas(64) Step {
  int8_t elements[kStep];
  int32_t start[kLanes];
  float factor[kLanes];
};

inline void prepare_step(const uint16_t* x, int blocks, Step* step) {
  std::memset(static_cast<void*>(step), 0, sizeof *step);
  for (int b = 0; b < blocks; ++b) {
    const Block block = rounded(x + b * kBlock);
    std::memcpy(step->elements + b * kBlock, block.elements, kBlock);
    for (int i = 0; i < kBlock; ++i) step->start[(b * kBlock + i) / 4] -= kOffset * block.elements[i];
    std::fill_n(step->factor + b * kLanes / 2, kLanes / 2, block.factor);
  }
}

template <int MT, int NT>
TARGET void tile(const Step* x, const uint8_t* codes, const float* scales, int64_t k, float* out, int64_t stride) {
  __m512 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < k; at += kStep, x += MT) {
    const auto there = static_cast<__mmask64>(at + kStep <= k ? ~uint64_t{0} : ~uint32_t{0});
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      __builtin_prefetch(codes + (n + NT) * k + at, 0, 2);
      __builtin_prefetch(codes + n * k + at + kNear);
      const __m512i w = _mm512_maskz_loadu_epi8(there, codes + n * k + at);
      for (int m = 0; m < MT; ++m) {
        const __m512i total = _mm512_dpbusd_epi32(_mm512_load_si512(x[m].start), w, _mm512_load_si512(x[m].elements));
        acc[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(x[m].factor), acc[m][n]);
      }
    }
  }
  float result[MT][NT];
  lane_sums<MT * NT>(acc[0], result[0]);
  for (int m = 0; m < MT; ++m) {
    for (int n = 0; n < NT; ++n) out[m * stride + n] = result[m][n] * scales[n];
  }
}

#undef TARGET

}  // namespace avx512vnni

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))

constexpr int kStep = kBlock, kRows = 4;

struct alignas(32) Step {
  int8_t elements[kStep];
  float factor;
};

inline void prepare_step(const uint16_t* x, int, Step* step) {
  const Block block = rounded(x);
  std::memcpy(step->elements, block.elements, kBlock);
  step->factor = block.factor;
}

template <int MT, int NT>
TARGET void tile(const Step* x, const uint8_t* codes, const float* scales, int64_t k, float* out, int64_t stride) {
  const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(static_cast<char>(kOffset));
  __m256 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm256_setzero_ps();
  }
  for (int64_t at = 0; at < k; at += kStep, x += MT) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      __builtin_prefetch(codes + (n + NT) * k + at, 0, 2);
      __builtin_prefetch(codes + n * k + at + kNear);
      const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + n * k + at)), offset);
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int m = 0; m < MT; ++m) {
        // Two products make at most 2 * 128 * 127, which 16 bits hold.
        const __m256i q = _mm256_sign_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].elements)), w);
        const __m256i total = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, q), ones);
        acc[m][n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(x[m].factor), acc[m][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) out[m * stride + n] = lane_sum(acc[m][n]) * scales[n];
  }
}

#undef TARGET

}  // namespace avx2

#define MLSPECQD_INT8_COLUMNS(isa, narrow) \
  namespace isa { \
  template <int MT> \
  void columns(const Step* x, const uint8_t* codes, const float* scales, int64_t k, int64_t begin, int64_t end, float* out, \
               int64_t stride) { \
    constexpr int NT = MT <= (narrow) ? 4 : 2; \
    int64_t n = begin; \
    for (; n + NT <= end; n += NT) tile<MT, NT>(x, codes + n * k, scales + n, k, out + n, stride); \
    for (; n < end; ++n) tile<MT, 1>(x, codes + n * k, scales + n, k, out + n, stride); \
  } \
  }

MLSPECQD_INT8_COLUMNS(avx512vnni, 4)
MLSPECQD_INT8_COLUMNS(avx2, 2)

#undef MLSPECQD_INT8_COLUMNS

#endif  // MLSPECQD_X86

#define MLSPECQD_INT8(isa) \
  namespace isa { \
  inline void prepare(const uint16_t* x, int rows, int64_t k, void* out) { \
    Step* step = static_cast<Step*>(out); \
    for (int64_t at = 0; at < k; at += kStep) { \
      const auto blocks = static_cast<int>(std::min<int64_t>(kStep, k - at) / kBlock); \
      for (int row = 0; row < rows; ++row, ++step) prepare_step(x + row * k + at, blocks, step); \
    } \
  } \
  template <int... Less> \
  void some_columns(const void* x, int rows, const uint8_t* codes, const float* scales, int64_t k, int64_t begin, int64_t end, \
                    float* out, int64_t stride, std::integer_sequence<int, Less...>) { \
    constexpr decltype(&columns<1>) table[] = {columns<Less + 1>...}; \
    table[rows - 1](static_cast<const Step*>(x), codes, scales, k, begin, end, out, stride); \
  } \
  inline void product(const void* x, int rows, const uint8_t* codes, const float* scales, int64_t k, int64_t begin, int64_t end, \
                      float* out, int64_t stride) { \
    some_columns(x, rows, codes, scales, k, begin, end, out, stride, std::make_integer_sequence<int, kRows>()); \
  } \
  inline constexpr Kernel kernel = {kRows, kStep, sizeof(Step), prepare, product}; \
  }

MLSPECQD_INT8(portable)
#if defined(MLSPECQD_X86)
MLSPECQD_INT8(avx512vnni)
MLSPECQD_INT8(avx2)
#endif

#undef MLSPECQD_INT8

}  // namespace mlspecqd::int8
