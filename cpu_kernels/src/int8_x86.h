// The products of int8.h by AVX-512 with its products of bytes (VNNI), and by AVX2.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "four_bits_lanes.h"
#include "int8.h"
#include "registers.h"
#include "target.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::int8 {

// A lane of 32 bits has the sum of four elements, a quarter of a register those of a half of a block. Numbers of halves, sixteen
// at a time, lie so that the numbers for one load of codes are one place in each quarter: place p of quarter q of a register of
// `quarters` belongs to half `quarters` p + q (AVX2, of two registers: of its own eight halves).
constexpr int kSpan = 8 * kBlock, kHalves = 16;

inline std::array<uint16_t, kHalves> places(int quarters, int shift) {
  std::array<uint16_t, kHalves> out = {};
  for (int i = 0; i < 4 * quarters; ++i) out[i] = static_cast<uint16_t>((i % 4 * quarters + i / 4) >> shift);
  return out;
}

namespace avx512vnni {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))

constexpr int kLanes = 16, kRows = 8, kLoad = 2 * kBlock;
template <class Form>
constexpr int kStep = Form::kGroups ? kSpan : kLoad;

// Blocks in order; of each lane's four elements the sum's starting value; the factors of rows' lanes, or those of halves in their
// places; for minima, the sums of halves times their factor.
template <class Form>
struct alignas(64) Step {
  int8_t elements[kStep<Form>];
  int32_t start[kStep<Form> / 4];
  float factor[kLanes];
  float sum[Form::kMinimum ? kLanes : 1];
};

template <class Form>
void prepare_step(const uint16_t* x, int blocks, Step<Form>* step) {
  std::memset(static_cast<void*>(step), 0, sizeof *step);
  for (int b = 0; b < blocks; ++b) {
    const Block block = rounded(x + b * kBlock);
    std::memcpy(step->elements + b * kBlock, block.elements, kBlock);
    [[maybe_unused]] int totals[2] = {};
    for (int i = 0; i < kBlock; ++i) {
      totals[i / kHalf] += block.elements[i];
      step->start[(b * kBlock + i) / 4] -= Form::kOffset * block.elements[i];
    }
    if constexpr (Form::kGroups) {
      for (int half = 0; half < 2; ++half) {
        const int place = (2 * b + half) % 4 * 4 + b / 2;
        step->factor[place] = block.factor;
        if constexpr (Form::kMinimum) step->sum[place] = static_cast<float>(totals[half]) * block.factor;
      }
    } else {
      std::fill_n(step->factor + b * kLanes / 2, kLanes / 2, block.factor);
    }
  }
}

// The numbers of a span's groups, of which so many are there, in their places.
TARGET inline __m512 spread(const uint16_t* numbers, int64_t count, __m256i places) {
  const auto there = static_cast<__mmask16>((uint32_t{1} << std::min<int64_t>(count, kHalves)) - 1);
  return _mm512_cvtph_ps(_mm256_permutexvar_epi16(places, _mm256_maskz_loadu_epi16(there, numbers)));
}

template <class Form, int MT, int NT>
TARGET void tile(const Step<Form>* x, const Weight& weight, int64_t first, int64_t k, float* out, int64_t stride) {
  const int64_t groups = groups_of(weight, k);
  const auto order = int8::places(4, weight.shift);
  const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order.data()));
  __m512 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < k; at += kStep<Form>, x += MT) {
    __m512 factor[NT][MT];
    if constexpr (Form::kGroups) {
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        const int64_t group = at / kHalf >> weight.shift, number = (first + n) * groups + group;
        const __m512 scale = spread(static_cast<const uint16_t*>(weight.scales) + number, groups - group, places);
        for (int m = 0; m < MT; ++m) factor[n][m] = _mm512_mul_ps(scale, _mm512_load_ps(x[m].factor));
        if constexpr (Form::kMinimum) {
          const __m512 minimum = spread(weight.minima + number, groups - group, places);
          for (int m = 0; m < MT; ++m) acc[m][n] = _mm512_fmadd_ps(minimum, _mm512_load_ps(x[m].sum), acc[m][n]);
        }
      }
    }
#pragma GCC unroll 4
    for (int load = 0; load < kStep<Form> / kLoad; ++load) {
      const int64_t from = at + load * kLoad;
      if (from >= k) break;
      const auto there = static_cast<__mmask64>(from + kLoad <= k ? ~uint64_t{0} : ~uint32_t{0});
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        const uint8_t* codes = weight.codes + (first + n) * k + from;
        __builtin_prefetch(codes + NT * k, 0, 2);
        __builtin_prefetch(codes + kNear);
        const __m512i w = _mm512_maskz_loadu_epi8(there, codes);
        for (int m = 0; m < MT; ++m) {
          const __m512i start = _mm512_load_si512(x[m].start + load * kLanes);
          const __m512i total = _mm512_dpbusd_epi32(start, w, _mm512_load_si512(x[m].elements + load * kLoad));
          const __m512 each =
              Form::kGroups ? _mm512_permutevar_ps(factor[n][m], _mm512_set1_epi32(load)) : _mm512_load_ps(x[m].factor);
          acc[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), each, acc[m][n]);
        }
      }
    }
  }
  float result[MT][NT];
  lane_sums<MT * NT>(acc[0], result[0]);
  for (int m = 0; m < MT; ++m) {
    for (int n = 0; n < NT; ++n) {
      const float sum = result[m][n];
      out[m * stride + first + n] = Form::kGroups ? sum : sum * static_cast<const float*>(weight.scales)[first + n];
    }
  }
}

#undef TARGET

}  // namespace avx512vnni

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

constexpr int kLanes = 8, kRows = 4;
template <class Form>
constexpr int kStep = Form::kGroups ? kSpan : kBlock;
template <class Form>
constexpr int kPart = Form::kGroups ? kSpan / 2 : kBlock;  // whose factors fill a register

// Blocks in order; the factor of a row's block, or those of halves in their places; for minima, the sums of halves times it, and of
// each lane's four elements the sum's starting value, since codes less 128 are multiplied.
template <class Form>
struct alignas(32) Step {
  int8_t elements[kStep<Form>];
  float factor[Form::kGroups ? kHalves : 1];
  float sum[Form::kMinimum ? kHalves : 1];
  int32_t start[Form::kMinimum ? kStep<Form> / 4 : 1];
};

template <class Form>
void prepare_step(const uint16_t* x, int blocks, Step<Form>* step) {
  std::memset(static_cast<void*>(step), 0, sizeof *step);
  for (int b = 0; b < blocks; ++b) {
    const Block block = rounded(x + b * kBlock);
    std::memcpy(step->elements + b * kBlock, block.elements, kBlock);
    for (int i = 0; i < kBlock && Form::kMinimum; ++i) {
      step->start[(b * kBlock + i) / 4] += (Rows::kOffset - Form::kOffset) * block.elements[i];
    }
    for (int half = 0; half < 2; ++half) {
      const int place = Form::kGroups ? b / 4 * kLanes + half * 4 + b % 4 : 0;
      step->factor[place] = block.factor;
      int total = 0;
      for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) total += block.elements[i];
      if constexpr (Form::kMinimum) step->sum[place] = static_cast<float>(total) * block.factor;
    }
  }
}

// The numbers of eight halves' groups from a place of [rows, groups] on, in their places.
TARGET inline __m256 spread(const void* numbers, int64_t at, int64_t size, __m128i places) {
  std::array<uint16_t, kLanes> copy;
  const uint16_t* found = four_bits::whole(static_cast<const uint16_t*>(numbers), at, size, &copy);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(found)), places));
}

// acc[m] += a block of a row of the weight by those of x, times `each`[m].
template <class Form, int MT>
TARGET inline __attribute__((always_inline)) void add_block(const Step<Form>* x, const uint8_t* codes, int64_t block,
                                                            const __m256* each, __m256* acc) {
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(Rows::kOffset)), ones = _mm256_set1_epi16(1);
  const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), offset);
  const __m256i magnitude = _mm256_abs_epi8(w);
  for (int m = 0; m < MT; ++m) {
    // Two products make at most 2 * 128 * 127, which 16 bits hold.
    const __m256i elements = _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].elements + block * kBlock));
    __m256i total = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(elements, w)), ones);
    if constexpr (Form::kMinimum) {
      total = _mm256_add_epi32(total, _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].start + block * kLanes)));
    }
    acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), each[m], acc[m]);
  }
}

template <class Form, int MT, int NT>
TARGET void tile(const Step<Form>* x, const Weight& weight, int64_t first, int64_t k, float* out, int64_t stride) {
  const int64_t groups = groups_of(weight, k), size = weight.rows * groups;
  uint8_t order[2 * kLanes];  // of bytes
  const auto words = places(2, weight.shift);
  for (int i = 0; i < 2 * kLanes; ++i) order[i] = static_cast<uint8_t>(2 * words[i / 2] + i % 2);
  const __m128i indices = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  __m256 acc[NT][MT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm256_setzero_ps();
  }
  for (int64_t at = 0; at < k; at += kPart<Form>) {
    const int part = Form::kGroups ? static_cast<int>(at % kSpan / kPart<Form>) : 0;
    const auto blocks = static_cast<int>(std::min<int64_t>(kPart<Form>, k - at) / kBlock);
    __m256 factor[NT][MT];
    if constexpr (Form::kGroups) {
      // Of blocks that are not there the sums are zero, but what is taken for their minima may be infinite.
      const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(blocks), _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3));
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        const int64_t number = (first + n) * groups + (at / kHalf >> weight.shift);
        const __m256 scale = spread(weight.scales, number, size, indices);
        for (int m = 0; m < MT; ++m) factor[n][m] = _mm256_mul_ps(scale, _mm256_load_ps(x[m].factor + part * kLanes));
        if constexpr (Form::kMinimum) {
          const __m256 minimum = _mm256_and_ps(spread(weight.minima, number, size, indices), _mm256_castsi256_ps(there));
          for (int m = 0; m < MT; ++m) acc[n][m] = _mm256_fmadd_ps(minimum, _mm256_load_ps(x[m].sum + part * kLanes), acc[n][m]);
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kPart<Form> / kBlock; ++b) {
      if (b >= blocks) break;
#pragma GCC unroll 4
      for (int n = 0; n < NT; ++n) {
        const uint8_t* codes = weight.codes + (first + n) * k + at + b * kBlock;
        if (b % 2 == 0) {
          __builtin_prefetch(codes + NT * k, 0, 2);
          __builtin_prefetch(codes + kNear);
        }
        __m256 each[MT];
        for (int m = 0; m < MT; ++m) {
          each[m] = Form::kGroups ? _mm256_permutevar_ps(factor[n][m], _mm256_set1_epi32(b)) : _mm256_broadcast_ss(x[m].factor);
        }
        add_block<Form, MT>(x, codes, part * kPart<Form> / kBlock + b, each, acc[n]);
      }
    }
    if (part == kStep<Form> / kPart<Form> - 1) x += MT;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      const float sum = lane_sum(acc[n][m]);
      out[m * stride + first + n] = Form::kGroups ? sum : sum * static_cast<const float*>(weight.scales)[first + n];
    }
  }
}

#undef TARGET

}  // namespace avx2

#define MLSPECQD_INT8_COLUMNS(isa, narrow) \
  namespace isa { \
  template <class Form, int MT> \
  void columns(const Step<Form>* x, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride) { \
    constexpr int NT = MT <= (narrow) ? 4 : 2; \
    int64_t n = begin; \
    for (; n + NT <= end; n += NT) tile<Form, MT, NT>(x, w, n, k, out, stride); \
    for (; n < end; ++n) tile<Form, MT, 1>(x, w, n, k, out, stride); \
  } \
  }

MLSPECQD_INT8_COLUMNS(avx512vnni, 4)
MLSPECQD_INT8_COLUMNS(avx2, 2)

#undef MLSPECQD_INT8_COLUMNS

MLSPECQD_INT8(avx512vnni)
MLSPECQD_INT8(avx2)

}  // namespace mlspecqd::int8

#endif  // MLSPECQD_X86
