// Products x [M, K] bfloat16 by w [N, K] in codes of four bits to f32 [M, N], K a multiple of 32, for each instruction set and each
// form of weight: MXFP4, NVFP4, integers with a scale for each group, and those with a minimum too.
//
// Activations are rounded to eight bits by blocks of 32 along K: with a = max |x| of the block, q = round(x * 127/a), ties to even,
// and x is taken for q * a/127. What codes stand for is a multiple of integers e (of E2M1 twice the element: 0, 1, 2, 3, 4, 6, 8,
// 12), so that a sum over elements that share a scale is one of integers, exact and the same in any order, and
//   y[m, n] = sum over blocks and scales of ((sum of e q) * a/127 / multiple) * scale + (sum of q) * a/127 * minimum.
// A block of x whose a is below 2^-120 counts as zero; one that holds NaN or infinity makes the whole row of y NaN.
//
// To multiply unsigned by signed bytes, as the processors do, an offset is added to e, and that times the sum of q subtracted from
// each sum.
//
// All blocks of a group lie in the lanes of a register, one a lane, so that their sums are scaled together. The sum over groups is
// one accumulator's, in order, and its lanes are added in one order: a row's result does not depend on M, tiles or threads.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "floats.h"
#include "sums.h"
#include "target.h"

namespace mlspecqd::four_bits {

constexpr int kBlock = 32;

// A weight of so many rows as it is stored. `minima` may be null; `blocks` share one scale, where a form leaves that open.
struct Weight {
  const uint8_t* codes;
  const void* scales;
  const uint16_t* minima;
  int64_t rows;
  int64_t blocks;
};

// One instruction set's product for a form: rows of x are prepared in blocks of up to `rows`, each of `group_bytes` for every group
// of `group` elements of K, rounded up; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t group;
  int64_t group_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride);
};

using Table = std::array<uint8_t, 16>;  // of each code: what it stands for, times `kMultiple`, plus `kOffset`
constexpr Table kElements = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr Table kThemselves = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The forms: what codes are; how many scales a block of 32 has, a byte each (1: E8M0, a byte 0 is scale 0; 2: E4M3), or 0: a
// float16 for one block or several; whether there are minima, which lie as such scales.
struct Mxfp4 {
  static constexpr Table kTable = kElements;
  static constexpr int kOffset = 12, kMultiple = 2, kScales = 1;
  static constexpr bool kMinimum = false;
};
struct Nvfp4 {
  static constexpr Table kTable = kElements;
  static constexpr int kOffset = 12, kMultiple = 2, kScales = 2;
  static constexpr bool kMinimum = false;
};
struct Int4 {
  static constexpr Table kTable = kThemselves;
  static constexpr int kOffset = 8, kMultiple = 1, kScales = 0;
  static constexpr bool kMinimum = false;
};
struct Uint4 {
  static constexpr Table kTable = kThemselves;
  static constexpr int kOffset = 0, kMultiple = 1, kScales = 0;
  static constexpr bool kMinimum = true;
};

constexpr int sums_of(int scales) { return scales == 2 ? 2 : 1; }  // of integers in a block

// What a block's dwords belong to: of eight, four even elements each and then four odd ones, those of the first and second half.
constexpr int kHalves[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};

// A block's largest magnitude, as the bits of a bfloat16, to the factor that makes integers of it and the one that undoes that.
struct Factors {
  float to_integer;
  float back;
};

inline Factors factors(uint32_t largest, int multiple) {
  if (largest >= 0x7f80) return {0, as_float(0x7fc00000)};
  if (largest < 7 << 7) return {0, 0};  // 2^-120
  const float a = as_float(largest << 16);
  return {127 / a, a / static_cast<float>(127 * multiple)};
}

// The bits of an E4M3 that is not negative as those of a float16, 2^-8 of it.
constexpr uint16_t half_of_e4m3(uint8_t bits) { return static_cast<uint16_t>(bits << 7); }
constexpr float kOfE4m3 = 256;

namespace portable {

// A group is a block, in the order of the packed bytes: the even elements, then the odd ones. Signed 16-bit integers, of which
// compilers know how to vectorize a sum of products.
struct Block {
  int16_t elements[kBlock];
  float factor, sum;
};

inline void prepare_block(const uint16_t* x, int multiple, Block* block) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, x[i] & 0x7fffu);
  const Factors f = factors(largest, multiple);
  int32_t total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float scaled = f.to_integer == 0 ? 0 : widened(Bf16{x[i]}) * f.to_integer;
    const auto q = static_cast<int16_t>(std::nearbyintf(scaled));
    block->elements[i % 2 * (kBlock / 2) + i / 2] = q;
    total += q;
  }
  block->factor = f.back;
  block->sum = static_cast<float>(total) * f.back;
}

template <class Form>
void prepare(const uint16_t* x, int rows, int64_t k, void* out) {
  Block* block = static_cast<Block*>(out);
  for (int64_t at = 0; at < k; at += kBlock) {
    for (int row = 0; row < rows; ++row, ++block) prepare_block(x + row * k + at, Form::kMultiple, block);
  }
}

template <class Form>
float scale_of(const Weight& w, int64_t n, int64_t blocks, int64_t b, int half) {
  const auto* bytes = static_cast<const uint8_t*>(w.scales);
  if constexpr (Form::kScales == 1) return as_float(uint32_t{bytes[n * blocks + b]} << 23);
  if constexpr (Form::kScales == 2) return widened(Half{half_of_e4m3(bytes[2 * (n * blocks + b) + half])}) * kOfE4m3;
  const int64_t groups = (blocks + w.blocks - 1) / w.blocks;
  return widened(Half{static_cast<const uint16_t*>(w.scales)[n * groups + b / w.blocks]});
}

template <class Form>
void product(const void* prepared, int rows, const Weight& weight, int64_t k, int64_t begin, int64_t end, float* out,
             int64_t stride) {
  constexpr int kSums = sums_of(Form::kScales), kPart = kBlock / 2 / kSums;
  const int64_t blocks = k / kBlock;
  for (int64_t n = begin; n < end; ++n) {
    float sums[4] = {};
    const Block* x = static_cast<const Block*>(prepared);
    for (int64_t b = 0; b < blocks; ++b, x += rows) {
      const uint8_t* codes = weight.codes + (n * blocks + b) * (kBlock / 2);
      int16_t w[kBlock];
      for (int i = 0; i < kBlock / 2; ++i) {
        w[i] = static_cast<int16_t>(Form::kTable[codes[i] & 15] - Form::kOffset);
        w[kBlock / 2 + i] = static_cast<int16_t>(Form::kTable[codes[i] >> 4] - Form::kOffset);
      }
      for (int half = 0; half < kSums; ++half) {
        const float scale = scale_of<Form>(weight, n, blocks, b, half);
        for (int m = 0; m < rows; ++m) {
          int32_t total = 0;
          for (int i = half * kPart; i < (half + 1) * kPart; ++i) {
            total += int32_t{w[i]} * x[m].elements[i] + int32_t{w[kBlock / 2 + i]} * x[m].elements[kBlock / 2 + i];
          }
          sums[m] += (static_cast<float>(total) * x[m].factor) * scale;
        }
      }
      if constexpr (Form::kMinimum) {
        const int64_t groups = (blocks + weight.blocks - 1) / weight.blocks;
        const float minimum = widened(Half{weight.minima[n * groups + b / weight.blocks]});
        for (int m = 0; m < rows; ++m) sums[m] += minimum * x[m].sum;
      }
    }
    for (int m = 0; m < rows; ++m) out[m * stride + n] = sums[m];
  }
}

template <class Form>
inline constexpr Kernel kernel = {4, kBlock, sizeof(Block), prepare<Form>, product<Form>};

}  // namespace portable

#if defined(MLSPECQD_X86)

// Both x86 forms hold dword j of sixteen (eight) blocks in one register. A register as loaded holds four dwords of four (two)
// blocks, so four of them are transposed, and lane 4q + r then belongs to block 4r + q (2r + q) of the group: scales and
// activations are put into that order too.

// Of one row of x: for dword j of the blocks' even elements and of their odd ones, four elements a lane; the sums' starting
// values; the factors back; the sums themselves, for minima.
template <class Form, int lanes>
struct alignas(4 * lanes) Group {
  int32_t elements[8][lanes];
  int32_t start[sums_of(Form::kScales)][lanes];
  float factor[lanes];
  float sum[Form::kMinimum ? lanes : 1];
};

// Where, of the scales from a group's first on, that of each lane lies, if one serves so many blocks.
template <int lanes>
std::array<uint16_t, lanes> places(int64_t blocks) {
  std::array<uint16_t, lanes> out = {};
  for (int lane = 0; lane < lanes; ++lane) {
    const int block = lane % 4 * (lanes / 4) + lane / 4;
    out[lane] = static_cast<uint16_t>(block / blocks);
  }
  return out;
}

// So many of an array's numbers from `at` on: a copy where it ends before. What belongs to the next row is not used.
template <size_t count, class T>
const T* whole(const T* array, int64_t at, int64_t size, std::array<T, count>* copy) {
  if (at + static_cast<int64_t>(count) <= size) return array + at;
  *copy = {};
  std::copy(array + at, array + size, copy->begin());
  return copy->data();
}

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

// The columns of up to kRows prepared rows, by how many there are, and the kernel of a form.
#define MLSPECQD_FOUR_BITS(isa) \
  namespace isa { \
  template <class Form, int... Less> \
  void some_columns(const void* x, int rows, const Weight& w, int64_t blocks, int64_t begin, int64_t end, float* out, \
                    int64_t stride, std::integer_sequence<int, Less...>) { \
    constexpr decltype(&columns<Form, 1>) table[] = {columns<Form, Less + 1>...}; \
    table[rows - 1](static_cast<const Group<Form>*>(x), w, blocks, begin, end, out, stride); \
  } \
  template <class Form> \
  void product(const void* x, int rows, const Weight& w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride) { \
    some_columns<Form>(x, rows, w, k / kBlock, begin, end, out, stride, std::make_integer_sequence<int, kRows>()); \
  } \
  template <class Form> \
  inline constexpr Kernel kernel = {kRows, kGroup, sizeof(Group<Form>), prepare<Form>, product<Form>}; \
  }

MLSPECQD_FOUR_BITS(avx512vnni)
MLSPECQD_FOUR_BITS(avx2)

#undef MLSPECQD_FOUR_BITS

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::four_bits
