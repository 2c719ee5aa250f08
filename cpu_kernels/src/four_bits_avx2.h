// The products of four_bits.h by AVX2.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "four_bits_lanes.h"
#include "sums.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::four_bits {

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

constexpr int kLanes = 8, kGroup = kLanes * kBlock, kRows = 4;

template <class Form>
using Group = four_bits::Group<Form, kLanes>;

template <class Form>
TARGET void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  auto* group = static_cast<Group<Form>*>(out);
  for (int64_t at = 0; at < k; at += kGroup) {
    for (int row = 0; row < rows; ++row, ++group) {
      const int blocks = static_cast<int>(std::min<int64_t>(kLanes, (k - at) / kBlock));
      std::memset(static_cast<void*>(group), 0, sizeof *group);
      for (int b = 0; b < blocks; ++b) {
        portable::Block block;
        portable::prepare_block(x + row * k + at + b * kBlock, Form::kMultiple, &block);
        int8_t bytes[kBlock];
        int32_t totals[2] = {};
        for (int i = 0; i < kBlock; ++i) {
          bytes[i] = static_cast<int8_t>(block.elements[i]);
          totals[sums_of(Form::kScales) == 2 ? i / 8 % 2 : 0] += block.elements[i];
        }
        int32_t words[8];
        std::memcpy(words, bytes, sizeof words);
        const int lane = 4 * (b % 2) + b / 2;
        for (int j = 0; j < 8; ++j) group->elements[j][lane] = words[j];
        for (int part = 0; part < sums_of(Form::kScales); ++part) group->start[part][lane] = -Form::kOffset * totals[part];
        group->factor[lane] = block.factor;
        if constexpr (Form::kMinimum) group->sum[lane] = block.sum;
      }
    }
  }
}

TARGET inline __m256 halves(const uint16_t* at, __m128i places) {
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), places));
}

template <class Form, int MT>
TARGET inline void dot(const Group<Form>* x, const Weight& weight, int64_t n, int64_t blocks, __m128i places, __m256i remaining,
                       float* out, int64_t stride) {
  constexpr int kSums = sums_of(Form::kScales);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Form::kTable.data())));
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t size = weight.rows * blocks;  // of the weight, in blocks
  __m256 sums[MT];
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t at = 0; at < blocks; at += kLanes, x += MT) {
    std::array<uint8_t, kGroup / 2> last;
    const uint8_t* codes = whole(weight.codes, (n * blocks + at) * (kBlock / 2), size * (kBlock / 2), &last);
    // Activations of blocks that are not there are zero, but what is taken for their scales may be infinite.
    const __m256 there = _mm256_castsi256_ps(at + kLanes <= blocks ? _mm256_set1_epi32(-1) : remaining);
    __m256i v[4];
    for (int r = 0; r < 4; ++r) v[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * r));
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    const __m256i dwords[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                               _mm256_unpackhi_epi64(b, d)};
    __m256i w[8];
    for (int j = 0; j < 4; ++j) {
      w[j] = _mm256_shuffle_epi8(table, _mm256_and_si256(dwords[j], low));
      w[4 + j] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(dwords[j], 4), low));
    }
    __m256 scale[kSums], minimum = _mm256_setzero_ps();
    if constexpr (Form::kScales == 0) {
      const int64_t groups = (blocks + weight.blocks - 1) / weight.blocks, first = at / weight.blocks;
      const auto* scales = static_cast<const uint16_t*>(weight.scales);
      std::array<uint16_t, kLanes> copy;
      scale[0] = _mm256_and_ps(there, halves(whole(scales, n * groups + first, weight.rows * groups, &copy), places));
      if constexpr (Form::kMinimum) {
        minimum = _mm256_and_ps(there, halves(whole(weight.minima, n * groups + first, weight.rows * groups, &copy), places));
      }
    } else if constexpr (Form::kScales == 1) {
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
      std::array<uint8_t, kLanes> copy;
      const uint8_t* bytes = whole(static_cast<const uint8_t*>(weight.scales), n * blocks + at, size, &copy);
      const __m128i s = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), order);
      scale[0] = _mm256_and_ps(there, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(s), 23)));
    } else {
      std::array<uint8_t, 2 * kLanes> copy;
      const uint8_t* bytes = whole(static_cast<const uint8_t*>(weight.scales), 2 * (n * blocks + at), 2 * size, &copy);
      const __m128i s = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), places);
      const __m128i first = _mm_slli_epi16(_mm_and_si128(s, _mm_set1_epi16(255)), 7);
      const __m128i second = _mm_slli_epi16(_mm_srli_epi16(s, 8), 7);
      const __m256 factor = _mm256_and_ps(there, _mm256_set1_ps(kOfE4m3));
      scale[0] = _mm256_mul_ps(_mm256_cvtph_ps(first), factor);
      scale[1] = _mm256_mul_ps(_mm256_cvtph_ps(second), factor);
    }
    for (int m = 0; m < MT; ++m) {
      __m256i total[kSums];
      for (int part = 0; part < kSums; ++part) total[part] = _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].start[part]));
      for (int half = 0; half < 2; ++half) {
        // Of 16-bit sums two products hold at most 2 * 24 * 127 each, so five such pairs fit.
        __m256i pairs = _mm256_setzero_si256();
        for (const int j : kHalves[half]) {
          const __m256i q = _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].elements[j]));
          pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[j], q));
        }
        total[half % kSums] = _mm256_add_epi32(total[half % kSums], _mm256_madd_epi16(pairs, ones));
      }
      for (int part = 0; part < kSums; ++part) {
        const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(total[part]), _mm256_load_ps(x[m].factor));
        sums[m] = _mm256_fmadd_ps(sum, scale[part], sums[m]);
      }
      if constexpr (Form::kMinimum) sums[m] = _mm256_fmadd_ps(minimum, _mm256_load_ps(x[m].sum), sums[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    out[m * stride + n] = lane_sum(sums[m]);
  }
}

template <class Form, int MT>
TARGET void columns(const Group<Form>* x, const Weight& w, int64_t blocks, int64_t begin, int64_t end, float* out, int64_t stride) {
  uint8_t order[16];  // of bytes
  const auto words = places<kLanes>(Form::kScales == 0 ? w.blocks : 1);
  for (int i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>(2 * words[i / 2] + i % 2);
  const __m128i indices = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  alignas(32) int32_t remaining[kLanes];  // -1 in the lanes of the blocks that a row's last group has
  for (int lane = 0; lane < kLanes; ++lane) remaining[lane] = lane % 4 * 2 + lane / 4 < blocks % kLanes ? -1 : 0;
  const __m256i mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(remaining));
  for (int64_t n = begin; n < end; ++n) dot<Form, MT>(x, w, n, blocks, indices, mask, out, stride);
}

#undef TARGET

}  // namespace avx2

MLSPECQD_FOUR_BITS(avx2)

}  // namespace mlspecqd::four_bits

#endif  // MLSPECQD_X86
