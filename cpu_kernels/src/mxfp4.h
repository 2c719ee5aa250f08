// mxfp4_matmul: x [M, K] bfloat16 by w [N, K] in MXFP4 to f32 [M, N], K a multiple of 32, once for each instruction set.
//
// Activations are rounded to eight bits by blocks of 32 along K, the blocks of the weight: with a = max |x| of the block,
// q = round(x * 127/a), ties to even, and x is taken for q * a/127. Elements of the weight are taken twice, which makes them the
// integers e of {0, 1, 2, 3, 4, 6, 8, 12}. So the sum over a block is one of integers, exact and the same in any order, and
//   y[m, n] = sum over blocks b of ((sum of e q) * a/254) * 2^(s - 127), with scale byte s = 0 read as scale 0.
// A block of x whose a is below 2^-120 counts as zero; one that holds NaN or infinity makes the whole row of y NaN.
//
// To multiply unsigned by signed bytes, as the processors do, 12 is added to e and 12 (sum of q) subtracted from each block's sum.
//
// All blocks of a group lie in the lanes of a register, one a lane, so that their sums are scaled together. The sum over groups is
// one accumulator's, in order, and its lanes are added in one order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "sums.h"

namespace mlspecqd::mxfp4 {

constexpr int kBlock = 32, kOffset = 12;

// One instruction set's product: rows of x are prepared in blocks of up to `rows`, each of `group_bytes` for every group of `group`
// elements of K, rounded up; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t group;
  int64_t group_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const uint8_t* packed, const uint8_t* scales, int64_t k, int64_t begin, int64_t end,
                  float* out, int64_t stride);
};

// A block's largest magnitude, as the bits of a bfloat16, to the factor that makes integers of it and the one that undoes that and
// halves.
struct Factors {
  float to_integer;
  float back;
};

inline Factors factors(uint32_t largest) {
  if (largest >= 0x7f80) return {0, as_float(0x7fc00000)};
  if (largest < 7 << 7) return {0, 0};  // 2^-120
  const float a = as_float(largest << 16);
  return {127 / a, a / 254};
}

namespace portable {

// A group is a block, in the order of the packed bytes: the even elements, then the odd ones. Signed 16-bit integers, of which
// compilers know how to vectorize a sum of products.
struct Group {
  int16_t elements[kBlock];
  float factor;
};

inline void prepare_block(const uint16_t* x, Group* group) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, x[i] & 0x7fffu);
  const Factors f = factors(largest);
  for (int i = 0; i < kBlock; ++i) {
    const float scaled = f.to_integer == 0 ? 0 : widened(Bf16{x[i]}) * f.to_integer;
    group->elements[i % 2 * (kBlock / 2) + i / 2] = static_cast<int16_t>(std::nearbyintf(scaled));
  }
  group->factor = f.back;
}

inline void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  Group* group = static_cast<Group*>(out);
  for (int64_t at = 0; at < k; at += kBlock) {
    for (int row = 0; row < rows; ++row, ++group) prepare_block(x + row * k + at, group);
  }
}

// The integer that a code stands for, its element twice, in arithmetic that compilers vectorize.
inline int16_t element(int16_t code) {
  const int16_t magnitude = code & 7, sign = code >> 3;
  const int16_t beyond_4 = magnitude > 4 ? magnitude - 4 : 0, beyond_6 = magnitude > 6 ? magnitude - 6 : 0;
  const int16_t value = magnitude + beyond_4 + 2 * beyond_6;
  return (value ^ -sign) + sign;
}

inline void product(const void* prepared, int rows, const uint8_t* packed, const uint8_t* scales, int64_t k, int64_t begin,
                    int64_t end, float* out, int64_t stride) {
  const int64_t blocks = k / kBlock;
  for (int64_t n = begin; n < end; ++n) {
    float sums[4] = {};
    const Group* x = static_cast<const Group*>(prepared);
    for (int64_t b = 0; b < blocks; ++b, x += rows) {
      const uint8_t* codes = packed + (n * blocks + b) * (kBlock / 2);
      int16_t w[kBlock];
      for (int i = 0; i < kBlock / 2; ++i) w[i] = codes[i] & 15;
      for (int i = 0; i < kBlock / 2; ++i) w[kBlock / 2 + i] = codes[i] >> 4;
      for (int16_t& v : w) v = element(v);
      const float scale = as_float(uint32_t{scales[n * blocks + b]} << 23);
      for (int m = 0; m < rows; ++m) {
        int32_t total = 0;
        for (int i = 0; i < kBlock; ++i) total += int32_t{w[i]} * x[m].elements[i];
        sums[m] += (static_cast<float>(total) * x[m].factor) * scale;
      }
    }
    for (int m = 0; m < rows; ++m) out[m * stride + n] = sums[m];
  }
}

inline constexpr Kernel kernel = {4, kBlock, sizeof(Group), prepare, product};

}  // namespace portable

#if defined(MLSPECQD_X86)

// Both x86 forms hold dword j of sixteen (eight) blocks in one register. A register as loaded holds four dwords of four (two)
// blocks, so four of them are transposed, and lane 4q + r then belongs to block 4r + q (2r + q) of the group: scales and
// activations are put into that order too.

namespace avx512vnni {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))

constexpr int kLanes = 16, kGroup = kLanes * kBlock;
constexpr int64_t kNear = 1024;  // bytes

// Of one row of x: for dword j of the blocks' even elements and of their odd ones, four elements a lane; the sums' starting
// values; the factors back.
struct alignas(64) Group {
  int32_t elements[8][kLanes];  // even j = 0..3, odd j = 0..3
  int32_t start[kLanes];
  float factor[kLanes];
};

TARGET inline void prepare_block(const uint16_t* x, int lane, Group* group) {
  const __m512i pairs = _mm512_loadu_si512(x);
  const __m512i magnitude = _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitude), _mm512_extracti64x4_epi64(magnitude, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const uint32_t least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))));
  const Factors f = factors(~least & 0xffff);
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

TARGET inline void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  Group* group = static_cast<Group*>(out);
  for (int64_t at = 0; at < k; at += kGroup) {
    for (int row = 0; row < rows; ++row, ++group) {
      const int blocks = static_cast<int>(std::min<int64_t>(kLanes, (k - at) / kBlock));
      if (blocks < kLanes) std::memset(group, 0, sizeof *group);
      for (int b = 0; b < blocks; ++b) prepare_block(x + row * k + at + b * kBlock, 4 * (b % 4) + b / 4, group);
    }
  }
  const __m512i offset = _mm512_set1_epi8(kOffset);
  for (Group* g = static_cast<Group*>(out); g != group; ++g) {
    __m512i total = _mm512_setzero_si512();
    for (const auto& dwords : g->elements) total = _mm512_dpbusd_epi32(total, offset, _mm512_load_si512(dwords));
    _mm512_store_si512(g->start, _mm512_sub_epi32(_mm512_setzero_si512(), total));
  }
}

// One group of a row of the weight: dword j of its blocks, a block a lane, as elements (the even, then the odd ones), and the
// scales.
struct Decoded {
  __m512i elements[8];
  __m512 scale;
};

// Args:
//   blocks: how many of the group's blocks there are; those missing are read as zero elements with scale 0.
//   next: bytes from here to the same place in the tile that comes next, which is fetched meanwhile.
TARGET inline __attribute__((always_inline)) void decode(const uint8_t* packed, const uint8_t* scales, int64_t blocks, int64_t next,
                                                         Decoded& out) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_set1_epi8(15);
  __m512i v[4];
  __m128i s;
  if (blocks >= kLanes) {
    for (int r = 0; r < 4; ++r) {
      v[r] = _mm512_loadu_si512(packed + 64 * r);
      __builtin_prefetch(packed + 64 * r + next, 0, 2);
      __builtin_prefetch(packed + 64 * r + kNear);
    }
    s = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  } else {
    const uint64_t dwords = (uint64_t{1} << 4 * blocks) - 1;
    for (int r = 0; r < 4; ++r) v[r] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(dwords >> 16 * r), packed + 64 * r);
    s = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << blocks) - 1), scales);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
  for (int j = 0; j < 4; ++j) {
    out.elements[j] = _mm512_shuffle_epi8(table, _mm512_and_si512(v[j], low));
    out.elements[4 + j] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v[j], 4), low));
  }
  out.scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(s, order)), 23));
}

// out[m * stride + n] = the dot products of MT rows of x and NT rows of the weight.
template <int MT, int NT>
TARGET void tile(const Group* x, const uint8_t* packed, const uint8_t* scales, int64_t blocks, float* out, int64_t stride) {
  __m512 acc[MT][NT];
  for (auto& row : acc) {
    for (auto& element : row) element = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < blocks; at += kLanes, x += MT) {
#pragma GCC unroll 4
    for (int n = 0; n < NT; ++n) {
      Decoded w;
      decode(packed + (n * blocks + at) * (kBlock / 2), scales + n * blocks + at, blocks - at, NT * blocks * (kBlock / 2), w);
      __m512i totals[MT];
      for (int m = 0; m < MT; ++m) totals[m] = _mm512_load_si512(x[m].start);
      for (int j = 0; j < 8; ++j) {
        for (int m = 0; m < MT; ++m) totals[m] = _mm512_dpbusd_epi32(totals[m], w.elements[j], _mm512_load_si512(x[m].elements[j]));
      }
      for (int m = 0; m < MT; ++m) {
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(totals[m]), _mm512_load_ps(x[m].factor));
        acc[m][n] = _mm512_fmadd_ps(sum, w.scale, acc[m][n]);
      }
    }
  }
  float result[MT][NT];
  lane_sums<MT * NT>(acc[0], result[0]);
  for (int m = 0; m < MT; ++m) std::memcpy(out + m * stride, result[m], sizeof result[m]);
}

template <int MT>
TARGET void columns(const Group* x, const uint8_t* packed, const uint8_t* scales, int64_t blocks, int64_t begin, int64_t end,
                    float* out, int64_t stride) {
  constexpr int NT = MT <= 2 ? 4 : 2;
  int64_t n = begin;
  for (; n + NT <= end; n += NT) {
    tile<MT, NT>(x, packed + n * blocks * (kBlock / 2), scales + n * blocks, blocks, out + n, stride);
  }
  for (; n < end; ++n) tile<MT, 1>(x, packed + n * blocks * (kBlock / 2), scales + n * blocks, blocks, out + n, stride);
}

inline void product(const void* x, int rows, const uint8_t* packed, const uint8_t* scales, int64_t k, int64_t begin, int64_t end,
                    float* out, int64_t stride) {
  constexpr decltype(&columns<1>) table[] = {columns<1>, columns<2>, columns<3>, columns<4>,
                                             columns<5>, columns<6>, columns<7>, columns<8>};
  table[rows - 1](static_cast<const Group*>(x), packed, scales, k / kBlock, begin, end, out, stride);
}

inline constexpr Kernel kernel = {8, kGroup, sizeof(Group), prepare, product};

#undef TARGET

}  // namespace avx512vnni

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))

constexpr int kLanes = 8, kGroup = kLanes * kBlock;

struct alignas(32) Group {
  int32_t elements[8][kLanes];
  int32_t start[kLanes];
  float factor[kLanes];
};

TARGET inline void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  Group* group = static_cast<Group*>(out);
  for (int64_t at = 0; at < k; at += kGroup) {
    for (int row = 0; row < rows; ++row, ++group) {
      const int blocks = static_cast<int>(std::min<int64_t>(kLanes, (k - at) / kBlock));
      std::memset(group, 0, sizeof *group);
      for (int b = 0; b < blocks; ++b) {
        portable::Group block;
        portable::prepare_block(x + row * k + at + b * kBlock, &block);
        int8_t bytes[kBlock];
        int32_t total = 0;
        for (int i = 0; i < kBlock; ++i) {
          bytes[i] = static_cast<int8_t>(block.elements[i]);
          total += block.elements[i];
        }
        int32_t words[8];
        std::memcpy(words, bytes, sizeof words);
        const int lane = 4 * (b % 2) + b / 2;
        for (int j = 0; j < 8; ++j) group->elements[j][lane] = words[j];
        group->start[lane] = -kOffset * total;
        group->factor[lane] = block.factor;
      }
    }
  }
}

template <int MT>
TARGET inline void dot(const Group* x, const uint8_t* packed, const uint8_t* scales, int64_t blocks, float* out, int64_t stride) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 sums[MT];
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t at = 0; at < blocks; at += kLanes, x += MT) {
    alignas(32) uint8_t last[kGroup / 2 + kLanes];
    const uint8_t *codes = packed + at * (kBlock / 2), *bytes = scales + at;
    if (at + kLanes > blocks) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, codes, (blocks - at) * (kBlock / 2));
      std::memcpy(last + kGroup / 2, bytes, blocks - at);
      codes = last, bytes = last + kGroup / 2;
    }
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
    const __m128i s = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), order);
    const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(s), 23));
    for (int m = 0; m < MT; ++m) {
      // Of 16-bit sums two products hold at most 2 * 24 * 127 each, so five such pairs fit.
      __m256i pairs = _mm256_setzero_si256(), total = _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].start));
      for (int j = 0; j < 8; ++j) {
        const __m256i q = _mm256_load_si256(reinterpret_cast<const __m256i*>(x[m].elements[j]));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[j], q));
        if (j % 4 == 3) {
          total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
          pairs = _mm256_setzero_si256();
        }
      }
      sums[m] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_load_ps(x[m].factor)), scale, sums[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    out[m * stride] = lane_sum(sums[m]);
  }
}

template <int MT>
TARGET void columns(const Group* x, const uint8_t* packed, const uint8_t* scales, int64_t blocks, int64_t begin, int64_t end,
                    float* out, int64_t stride) {
  for (int64_t n = begin; n < end; ++n) {
    dot<MT>(x, packed + n * blocks * (kBlock / 2), scales + n * blocks, blocks, out + n, stride);
  }
}

inline void product(const void* x, int rows, const uint8_t* packed, const uint8_t* scales, int64_t k, int64_t begin, int64_t end,
                    float* out, int64_t stride) {
  constexpr decltype(&columns<1>) table[] = {columns<1>, columns<2>, columns<3>, columns<4>};
  table[rows - 1](static_cast<const Group*>(x), packed, scales, k / kBlock, begin, end, out, stride);
}

inline constexpr Kernel kernel = {4, kGroup, sizeof(Group), prepare, product};

#undef TARGET

}  // namespace avx2

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::mxfp4
