// The products of four_bits.h by AVX-512 with its products of bytes (VNNI).

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "four_bits_lanes.h"
#include "sums.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd::four_bits {

namespace avx512vnni {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))

constexpr int kLanes = 16, kGroup = kLanes * kBlock;
constexpr int64_t kNear = 1024;  // bytes

template <class Form>
using Group = four_bits::Group<Form, kLanes>;

template <class Form>
TARGET inline void prepare_block(const uint16_t* x, int lane, Group<Form>* group) {
  const __m512i pairs = _mm512_loadu_si512(x);
  const __m512i magnitude = _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitude), _mm512_extracti64x4_epi64(magnitude, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const uint32_t least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))));
  const Factors f = factors(~least & 0xffff, Form::kMultiple);
  const __m512 scale = _mm512_set1_ps(f.to_integer);
  const __mmask16 some = f.to_integer == 0 ? 0 : 0xffff;
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  alignas(16) int32_t words[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(words),
                  _mm512_maskz_cvtepi32_epi8(some, _mm512_cvtps_epi32(_mm512_mul_ps(even, scale))));
  _mm_store_si128(reinterpret_cast<__m128i*>(words + 4),
                  _mm512_maskz_cvtepi32_epi8(some, _mm512_cvtps_epi32(_mm512_mul_ps(odd, scale))));
  for (int j = 0; j < 8; ++j) group->elements[j][lane] = words[j];
  group->factor[lane] = f.back;
}

// A byte times the elements of each block, added: those of the halves from `first` to before `last`.
template <class Form>
TARGET inline __m512i sum_of(const Group<Form>& g, int byte, int first, int last) {
  __m512i total = _mm512_setzero_si512();
  for (int half = first; half < last; ++half) {
    for (const int j : kHalves[half]) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(static_cast<char>(byte)), _mm512_load_si512(g.elements[j]));
    }
  }
  return total;
}

template <class Form>
TARGET void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  auto* group = static_cast<Group<Form>*>(out);
  for (int64_t at = 0; at < k; at += kGroup) {
    for (int row = 0; row < rows; ++row, ++group) {
      const int blocks = static_cast<int>(std::min<int64_t>(kLanes, (k - at) / kBlock));
      if (blocks < kLanes) std::memset(static_cast<void*>(group), 0, sizeof *group);
      for (int b = 0; b < blocks; ++b) prepare_block<Form>(x + row * k + at + b * kBlock, 4 * (b % 4) + b / 4, group);
    }
  }
  constexpr int kSums = sums_of(Form::kScales);
  for (auto* g = static_cast<Group<Form>*>(out); g != group; ++g) {
    for (int part = 0; part < kSums; ++part) {
      const __m512i total = sum_of(*g, Form::kOffset, part, kSums == 1 ? 2 : part + 1);
      _mm512_store_si512(g->start[part], _mm512_sub_epi32(_mm512_setzero_si512(), total));
    }
    if constexpr (Form::kMinimum) {
      _mm512_store_ps(g->sum, _mm512_mul_ps(_mm512_cvtepi32_ps(sum_of(*g, 1, 0, 2)), _mm512_load_ps(g->factor)));
    }
  }
}

// One group of a row of the weight: dword j of its blocks, a block a lane, as elements (the even, then the odd ones), the scales,
// and the minima.
template <class Form>
struct Decoded {
  __m512i elements[8];
  __m512 scale[sums_of(Form::kScales)];
  __m512 minimum;
};

// The lanes of the blocks whose bits are set.
inline __mmask16 in_lanes(uint32_t blocks) {
  uint32_t lanes = 0;
  for (int block = 0; block < kLanes; ++block) lanes |= (blocks >> block & 1) << (4 * (block % 4) + block / 4);
  return static_cast<__mmask16>(lanes);
}

TARGET inline __m512 halves(const uint16_t* at, __m256i places) {
  return _mm512_cvtph_ps(_mm256_permutexvar_epi16(places, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
}

// The scales and minima of the group that begins with block `at` of row n.
template <class Form>
TARGET inline __attribute__((always_inline)) void numbers(const Weight& w, int64_t n, int64_t blocks, int64_t at, __m256i places,
                                                          Decoded<Form>& out) {
  if constexpr (Form::kScales == 0) {
    const int64_t groups = (blocks + w.blocks - 1) / w.blocks, first = at / w.blocks;
    std::array<uint16_t, kLanes> copy;
    const auto there = static_cast<__mmask16>((uint32_t{1} << std::min<int64_t>(kLanes, blocks - at)) - 1);
    const __mmask16 lanes = at + kLanes <= blocks ? 0xffff : in_lanes(there);
    const auto* scales = static_cast<const uint16_t*>(w.scales);
    out.scale[0] = _mm512_maskz_mov_ps(lanes, halves(whole(scales, n * groups + first, w.rows * groups, &copy), places));
    if constexpr (Form::kMinimum) {
      out.minimum = _mm512_maskz_mov_ps(lanes, halves(whole(w.minima, n * groups + first, w.rows * groups, &copy), places));
    }
    return;
  }
  const auto* bytes = static_cast<const uint8_t*>(w.scales) + (n * blocks + at) * Form::kScales;
  const auto there = static_cast<__mmask32>((uint64_t{1} << std::min<int64_t>(kLanes, blocks - at) * Form::kScales) - 1);
  if constexpr (Form::kScales == 1) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i s = _mm_shuffle_epi8(_mm_maskz_loadu_epi8(static_cast<__mmask16>(there), bytes), order);
    out.scale[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(s), 23));
  } else {
    const __m256i s = _mm256_permutexvar_epi16(places, _mm256_maskz_loadu_epi8(there, bytes));
    const __m256i first = _mm256_slli_epi16(_mm256_and_si256(s, _mm256_set1_epi16(255)), 7);
    const __m256i second = _mm256_slli_epi16(_mm256_srli_epi16(s, 8), 7);
    out.scale[0] = _mm512_mul_ps(_mm512_cvtph_ps(first), _mm512_set1_ps(kOfE4m3));
    out.scale[1] = _mm512_mul_ps(_mm512_cvtph_ps(second), _mm512_set1_ps(kOfE4m3));
  }
}

// Args:
//   blocks: how many of the group's blocks there are; those missing are read as code 0, and their activations are zero.
//   next: bytes from here to the same place in the tile that comes next, which is fetched meanwhile.
template <class Form>
TARGET inline __attribute__((always_inline)) void decode(const uint8_t* packed, int64_t blocks, int64_t next, Decoded<Form>& out) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Form::kTable.data())));
  const __m512i low = _mm512_set1_epi8(15);
  __m512i v[4];
  if (blocks >= kLanes) {
    for (int r = 0; r < 4; ++r) {
      v[r] = _mm512_loadu_si512(packed + 64 * r);
      __builtin_prefetch(packed + 64 * r + next, 0, 2);
      __builtin_prefetch(packed + 64 * r + kNear);
    }
  } else {
    const uint64_t dwords = (uint64_t{1} << 4 * blocks) - 1;
    for (int r = 0; r < 4; ++r) v[r] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(dwords >> 16 * r), packed + 64 * r);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
  for (int j = 0; j < 4; ++j) {
    out.elements[j] = _mm512_shuffle_epi8(table, _mm512_and_si512(v[j], low));
    out.elements[4 + j] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v[j], 4), low));
  }
}

// out[m * stride + n] = the dot products of MT rows of x and NT rows of the weight, from row n on.
template <class Form, int MT, int NT>
TARGET void tile(const Group<Form>* x, const Weight& weight, int64_t first, int64_t blocks, __m256i places, float* out,
                 int64_t stride) {
  constexpr int kSums = sums_of(Form::kScales);
  __m512 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < blocks; at += kLanes, x += MT) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      Decoded<Form> w;
      decode<Form>(weight.codes + ((first + n) * blocks + at) * (kBlock / 2), blocks - at, NT * blocks * (kBlock / 2), w);
      numbers<Form>(weight, first + n, blocks, at, places, w);
      __m512i totals[kSums][MT];
      for (int part = 0; part < kSums; ++part) {
        for (int m = 0; m < MT; ++m) totals[part][m] = _mm512_load_si512(x[m].start[part]);
      }
      for (int half = 0; half < 2; ++half) {
        for (const int j : kHalves[half]) {
          for (int m = 0; m < MT; ++m) {
            auto& total = totals[half % kSums][m];
            total = _mm512_dpbusd_epi32(total, w.elements[j], _mm512_load_si512(x[m].elements[j]));
          }
        }
      }
      for (int part = 0; part < kSums; ++part) {
        for (int m = 0; m < MT; ++m) {
          const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(totals[part][m]), _mm512_load_ps(x[m].factor));
          acc[m][n] = _mm512_fmadd_ps(sum, w.scale[part], acc[m][n]);
        }
      }
      if constexpr (Form::kMinimum) {
        for (int m = 0; m < MT; ++m) acc[m][n] = _mm512_fmadd_ps(w.minimum, _mm512_load_ps(x[m].sum), acc[m][n]);
      }
    }
  }
  float result[MT][NT];
  lane_sums<MT * NT>(acc[0], result[0]);
  for (int m = 0; m < MT; ++m) std::memcpy(out + m * stride + first, result[m], sizeof result[m]);
}

template <class Form, int MT>
TARGET void columns(const Group<Form>* x, const Weight& w, int64_t blocks, int64_t begin, int64_t end, float* out, int64_t stride) {
  constexpr int NT = MT <= 2 ? 4 : 2;
  const auto order = places<kLanes>(Form::kScales == 0 ? w.blocks : 1);
  const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order.data()));
  int64_t n = begin;
  for (; n + NT <= end; n += NT) tile<Form, MT, NT>(x, w, n, blocks, indices, out, stride);
  for (; n < end; ++n) tile<Form, MT, 1>(x, w, n, blocks, indices, out, stride);
}

#undef TARGET

constexpr int kRows = 8;

}  // namespace avx512vnni

MLSPECQD_FOUR_BITS(avx512vnni)

}  // namespace mlspecqd::four_bits

#endif  // MLSPECQD_X86
