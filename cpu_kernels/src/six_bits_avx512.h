// The products of six_bits.h by AVX-512 with its products of bytes (VNNI). These multiply unsigned by signed bytes, so kOffset is
// added to the integers, and that times the sum of q subtracted from each sum.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "six_bits.h"
#include "six_bits_avx2.h"
#include "sums.h"
#include "target.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::six_bits {

namespace avx512vnni {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))

constexpr int kRows = 8, kOffset = 64;
constexpr int64_t kNear = 1024;  // bytes

// Eight blocks of a row of x: word j of each, and in each one's two lanes the sums' starting values and its factor.
struct alignas(64) Group {
  static constexpr int kBlocks = 8;
  int8_t elements[kWords][kBlocks][kWord];
  int32_t start[2 * kBlocks];
  float factor[2 * kBlocks];

  void put(const uint16_t* x, int multiple, int place) {
    int8_t block[kBlock];
    factor[2 * place] = factor[2 * place + 1] = avx2::rounded(x, multiple, block);
    start[2 * place] = start[2 * place + 1] = 0;
    for (int i = 0; i < kBlock; ++i) start[2 * place + i % kWord / 4] -= kOffset * block[i];
    for (int j = 0; j < kWords; ++j) std::memcpy(elements[j][place], block + j * kWord, kWord);
  }
};

constexpr int kBlocks = Group::kBlocks, kGroupBytes = kBlocks * kBlockBytes, kBlockWords = kBlockBytes / kWord;

// Where word i of each of eight blocks lies: of the first sixteen words, and of what was found there and the last eight.
struct alignas(64) Places {
  int64_t first[kBlocks], last[kBlocks];
};

constexpr Places places_of(int i) {
  Places places = {};
  for (int block = 0; block < kBlocks; ++block) {
    const int word = block * kBlockWords + i;
    places.first[block] = word % 16;
    places.last[block] = word < 16 ? block : word - 8;
  }
  return places;
}

constexpr Places kPlaces[kBlockWords] = {places_of(0), places_of(1), places_of(2)};

// Word j of eight blocks of a row of the weight as integers plus kOffset, those of `large` to be multiplied by kTimes where that is
// not one, or else all lie in `small`; the scale of each block in its two lanes.
template <class Form>
struct Elements {
  __m512i small[kWords], large[Form::kTimes > 1 ? kWords : 1];
  __m512 scale;
};

TARGET inline __attribute__((always_inline)) __m512i with_offset(const Table& table) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.data()));
  return _mm512_broadcast_i32x4(_mm_add_epi8(bytes, _mm_set1_epi8(kOffset)));
}

// Args:
//   blocks: how many there are; those missing are read as zeros, and their activations are zero.
//   next: bytes from here to the same place in the tile that comes next, which is fetched meanwhile.
template <class Form>
TARGET inline __attribute__((always_inline)) void decode(const uint8_t* codes, const uint8_t* scales, int64_t blocks, int64_t next,
                                                         Elements<Form>& out) {
  __m512i v[kBlockWords];
  const uint32_t there = (uint32_t{1} << kBlockWords * std::min<int64_t>(blocks, kBlocks)) - 1;
  for (int i = 0; i < kBlockWords; ++i) {
    v[i] = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(there >> 8 * i), codes + 64 * i);
    __builtin_prefetch(codes + 64 * i + next, 0, 2);
    __builtin_prefetch(codes + 64 * i + kNear);
  }
  __m512i words[kBlockWords];  // of each block
  for (int i = 0; i < kBlockWords; ++i) {
    const __m512i some = _mm512_permutex2var_epi64(v[0], _mm512_load_si512(kPlaces[i].first), v[1]);
    words[i] = _mm512_permutex2var_epi64(some, _mm512_load_si512(kPlaces[i].last), v[2]);
  }
  const __m512i small = with_offset(Form::kSmall), large = with_offset(Form::kLarge);
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(kOffset),
                twice = _mm512_set1_epi8(static_cast<char>(2 * kOffset));
  __m512i upper = words[2];
  for (int j = kWords - 1; j >= 0; --j) {  // the last word's bits are the top ones
    const __m512i lower = _mm512_and_si512(j < 2 ? words[j] : _mm512_srli_epi16(words[j - 2], 4), low);
    const __mmask64 below = _mm512_movepi8_mask(upper);
    upper = _mm512_add_epi8(upper, upper);
    const __mmask64 is_large = _mm512_movepi8_mask(upper);
    upper = _mm512_add_epi8(upper, upper);
    if constexpr (Form::kTimes > 1) {
      const __m512i a = _mm512_mask_shuffle_epi8(zero, ~is_large, small, lower);
      const __m512i b = _mm512_mask_shuffle_epi8(zero, is_large, large, lower);
      out.small[j] = _mm512_mask_sub_epi8(a, below, twice, a);
      out.large[j] = _mm512_mask_sub_epi8(b, below, twice, b);
    } else {
      const __m512i a = _mm512_mask_shuffle_epi8(_mm512_add_epi8(lower, zero), is_large, large, lower);
      out.small[j] = _mm512_mask_sub_epi8(a, below, twice, a);
    }
  }
  const auto count = static_cast<__mmask16>((uint32_t{1} << std::min<int64_t>(blocks, kBlocks)) - 1);
  const __m128i bytes = _mm_maskz_loadu_epi8(count, scales);
  out.scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)), 23));
}

// out[m * stride + n] = the dot products of MT rows of x and NT rows of the weight, from row n on.
template <class Form, int MT, int NT>
TARGET void tile(const Group* x, const Weight& weight, int64_t first, int64_t blocks, float* out, int64_t stride) {
  const auto* scales = static_cast<const uint8_t*>(weight.scales);
  __m512 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < blocks; at += kBlocks, x += MT) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      const int64_t place = (first + n) * blocks + at;
      Elements<Form> w;
      decode<Form>(weight.codes + place * kBlockBytes, scales + place, blocks - at, NT * blocks * kBlockBytes, w);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        const __m512i start = _mm512_load_si512(x[m].start);
        __m512i total = start, more = start;
        for (int j = 0; j < kWords; ++j) {
          const __m512i q = _mm512_load_si512(x[m].elements[j]);
          total = _mm512_dpbusd_epi32(total, w.small[j], q);
          if constexpr (Form::kTimes > 1) more = _mm512_dpbusd_epi32(more, w.large[j], q);
        }
        if constexpr (Form::kTimes > 1) {
          static_assert(Form::kTimes == 8, "three bits");
          total = _mm512_add_epi32(total, _mm512_slli_epi32(more, 3));
        }
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(x[m].factor));
        acc[m][n] = _mm512_fmadd_ps(sum, w.scale, acc[m][n]);
      }
    }
  }
  float result[MT][NT];
  lane_sums<MT * NT>(acc[0], result[0]);
  for (int m = 0; m < MT; ++m) std::memcpy(out + m * stride + first, result[m], sizeof result[m]);
}

template <class Form, int MT>
void columns(const Group* x, const Weight& w, int64_t blocks, int64_t begin, int64_t end, float* out, int64_t stride) {
  constexpr int NT = MT <= 2 ? 4 : 2;
  int64_t n = begin;
  for (; n + NT <= end; n += NT) tile<Form, MT, NT>(x, w, n, blocks, out, stride);
  for (; n < end; ++n) tile<Form, MT, 1>(x, w, n, blocks, out, stride);
}

#undef TARGET

}  // namespace avx512vnni

MLSPECQD_SIX_BITS(avx512vnni)

}  // namespace mlspecqd::six_bits

#endif  // MLSPECQD_X86
