// The products of six_bits.h by AVX2. Signs are put on the activations, so that the codes' magnitudes are the unsigned bytes.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "six_bits.h"
#include "sums.h"
#include "target.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::six_bits {

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))

constexpr int kRows = 8;
constexpr int64_t kNear = 8192;  // bytes: rows follow each other, and the processor fetches ahead in pages of 4096 alone

// Sixteen numbers times a factor, rounded to integers.
TARGET inline __m128i sixteen(const uint16_t* x, __m256 factor) {
  __m128i eights[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i)));
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)), factor));
    eights[i] = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  }
  return _mm_packs_epi16(eights[0], eights[1]);
}

// Writes the integers of a block of x and returns the factor back, as four_bits::portable::prepare_block.
TARGET inline float rounded(const uint16_t* x, int multiple, int8_t (&out)[kBlock]) {
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kBlock; i += 16) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(some, _mm256_set1_epi16(0x7fff)));
  }
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  const uint32_t least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1))));
  const four_bits::Factors f = four_bits::factors(~least & 0xffff, multiple);
  for (int i = 0; i < kBlock; i += 16) {
    const __m128i q = f.to_integer == 0 ? _mm_setzero_si128() : sixteen(x + i, _mm256_set1_ps(f.to_integer));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), q);
  }
  return f.back;
}

// Four blocks of a row of x: word j of each, and each one's factor in its two lanes.
struct alignas(32) Group {
  static constexpr int kBlocks = 4;
  int8_t elements[kWords][kBlocks][kWord];
  float factor[2 * kBlocks];

  void put(const uint16_t* x, int multiple, int place) {
    int8_t block[kBlock];
    factor[2 * place] = factor[2 * place + 1] = rounded(x, multiple, block);
    for (int j = 0; j < kWords; ++j) std::memcpy(elements[j][place], block + j * kWord, kWord);
  }
};

constexpr int kBlocks = Group::kBlocks, kGroupBytes = kBlocks * kBlockBytes;

// The words of lower bits of four blocks, and those of their upper bits.
struct Words {
  __m256i lower[2], upper;
};

// Sixteen bytes of a block from `at` on, and those two blocks further.
TARGET inline __m256i pair(const uint8_t* at) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 2 * kBlockBytes));
  return _mm256_blend_epi32(_mm256_castsi128_si256(first), _mm256_broadcastsi128_si256(second), 0xf0);
}

TARGET inline __attribute__((always_inline)) Words words(const uint8_t* codes) {
  const __m256i a = pair(codes), b = pair(codes + kBlockBytes);
  const __m256i c = pair(codes + kWord), d = pair(codes + kBlockBytes + kWord);
  return {{_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)}, _mm256_unpackhi_epi64(c, d)};
}

// What lower bits stand for, with the upper ones in the top bits of each byte: magnitudes, those of `large` to be multiplied by
// kTimes where that is not one (or else all lie in `small`), and bytes that are below zero where the elements are, and never zero.
struct Elements {
  __m256i small, large, sign;
};

template <class Form>
TARGET inline __attribute__((always_inline)) Elements decoded(__m256i lower, __m256i upper) {
  const __m256i first = _mm256_add_epi8(upper, upper);  // the exponent's first bit comes to the top
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Form::kLarge.data())));
  const __m256i large = _mm256_shuffle_epi8(table, lower), sign = _mm256_or_si256(upper, _mm256_set1_epi8(1));
  if constexpr (Form::kTimes == 1) {
    return {_mm256_blendv_epi8(lower, large, first), large, sign};
  } else {
    const __m256i other = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Form::kSmall.data())));
    const __m256i small = _mm256_shuffle_epi8(other, lower), none = _mm256_setzero_si256();
    return {_mm256_blendv_epi8(small, none, first), _mm256_blendv_epi8(none, large, first), sign};
  }
}

// Adds the products of a group with those of MT rows of x.
template <class Form, int MT>
TARGET inline __attribute__((always_inline)) void add(const Group* x, const uint8_t* codes, __m256 scale, __m256 (&sums)[MT]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), times = _mm256_set1_epi16(Form::kTimes);
  const Words w = words(codes);
  __m256i upper = w.upper, totals[MT];
#pragma GCC unroll 2
  for (int half = 1; half >= 0; --half) {  // the last words' bits are the top ones
    Elements e[2];
#pragma GCC unroll 2
    for (int j = 1; j >= 0; --j) {
      const __m256i lower = half == 0 ? w.lower[j] : _mm256_srli_epi16(w.lower[j], 4);
      e[j] = decoded<Form>(_mm256_and_si256(lower, low), upper);
      upper = _mm256_add_epi8(upper, upper);
      upper = _mm256_add_epi8(upper, upper);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const auto* q = reinterpret_cast<const __m256i*>(x[m].elements[2 * half]);
      const __m256i a = _mm256_sign_epi8(_mm256_load_si256(q), e[0].sign);
      const __m256i b = _mm256_sign_epi8(_mm256_load_si256(q + 1), e[1].sign);
      // Four products make at most 4 * 60 * 127, which 16 bits hold.
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(e[0].small, a), _mm256_maddubs_epi16(e[1].small, b));
      __m256i total = _mm256_madd_epi16(pairs, ones);
      if constexpr (Form::kTimes > 1) {
        const __m256i more = _mm256_add_epi16(_mm256_maddubs_epi16(e[0].large, a), _mm256_maddubs_epi16(e[1].large, b));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(more, times));
      }
      totals[m] = half == 1 ? total : _mm256_add_epi32(totals[m], total);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(totals[m]), _mm256_load_ps(x[m].factor));
    sums[m] = _mm256_fmadd_ps(sum, scale, sums[m]);
  }
}

// The scales of four blocks, each in two lanes.
TARGET inline __attribute__((always_inline)) __m256i scales_of(const uint8_t* bytes) {
  int32_t all;
  std::memcpy(&all, bytes, sizeof all);
  const __m256i lanes = _mm256_setr_epi8(0, -1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1,  //
                                         2, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1);
  return _mm256_slli_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(all), lanes), 23);
}

template <class Form, int MT>
TARGET void columns(const Group* x, const Weight& w, int64_t blocks, int64_t begin, int64_t end, float* out, int64_t stride) {
  const int64_t whole = blocks / kBlocks, rest = blocks % kBlocks, size = w.rows * blocks;
  // What follows a row's last blocks is the next row's: activations are zero there, but what is taken for scales may be infinite.
  const __m256i there =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(2 * rest)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  std::array<uint8_t, kGroupBytes> last_codes = {};
  std::array<uint8_t, kBlocks> last_scales = {};
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* codes = w.codes + n * blocks * kBlockBytes;
    const uint8_t* scales = static_cast<const uint8_t*>(w.scales) + n * blocks;
    const Group* group = x;
    __m256 sums[MT];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; ++i, group += MT, codes += kGroupBytes, scales += kBlocks) {
      __builtin_prefetch(codes + kNear);
      __builtin_prefetch(codes + kNear + 64);
      add<Form, MT>(group, codes, _mm256_castsi256_ps(scales_of(scales)), sums);
    }
    if (rest > 0) {
      if (n * blocks + (whole + 1) * kBlocks > size) {  // beyond the weight's end
        std::copy_n(codes, rest * kBlockBytes, last_codes.begin());
        std::copy_n(scales, rest, last_scales.begin());
        codes = last_codes.data(), scales = last_scales.data();
      }
      add<Form, MT>(group, codes, _mm256_castsi256_ps(_mm256_and_si256(scales_of(scales), there)), sums);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) out[m * stride + n] = lane_sum(sums[m]);
  }
}

#undef TARGET

}  // namespace avx2

MLSPECQD_SIX_BITS(avx2)

}  // namespace mlspecqd::six_bits

#endif  // MLSPECQD_X86
