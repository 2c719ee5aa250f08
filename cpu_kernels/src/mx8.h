// mx8_matmul: x [M, K] bfloat16 by w [N, K] in an MX format of eight bits to f32 [M, N], K a multiple of 32, once for each
// instruction set.
//
// Nothing is rounded but the sums: an element times its block's scale is a number of f32, and so is that times a bfloat16. On x86
// an element is put into a float16 of the same sign, exponent field and leading mantissa bits, which the processor widens,
// subnormal ones too. That is the element over 2^(15 - bias), so the sums are multiplied by that power at the end.
//
// A scale byte of 0 is read as scale 0, and elements, products and sums below about 2^-112 count as zero. The codes that FP8 sets
// aside for infinity and NaN never stand for a weight.

#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "floats.h"
#include "registers.h"

namespace mlspecqd::mx8 {

constexpr int kBlock = 32;
constexpr int64_t kNear = 512;  // bytes

// A sign, exponent bits with bias 2^(exponent_bits - 1) - 1, mantissa bits.
struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
};

// One instruction set's product: rows are prepared in blocks of up to `rows`, as f32; then any range of columns may be computed.
struct Kernel {
  int rows;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, float* out);
  void (*product)(const float* x, int rows, Format format, const uint8_t* codes, const uint8_t* scales, int64_t k, int64_t begin,
                  int64_t end, float* out, int64_t stride);
};

namespace portable {

#define TARGET

using namespace registers::portable;

constexpr int kParts = kBlock / kLanes, kRows = 4;

constexpr int width(int) { return 2; }

// How elements are decoded: they come out as they are. A subnormal one is given an implicit one, which is subtracted again.
struct Decoder {
  explicit Decoder(Format f)
      : sign(f.bits() - 1), magnitude((1 << sign) - 1), implicit(1 << f.mantissa_bits), shift(23 - f.mantissa_bits),
        exponent((127 - f.bias()) << 23), one(as_float((128 - f.bias()) << 23)) {}

  void operator()(const uint8_t* codes, float scale, Vector (&out)[kParts]) const {
    for (int i = 0; i < kBlock; ++i) {
      const int32_t bits = codes[i] & magnitude, subnormal = bits < implicit;
      const float value = as_float(((bits + (subnormal ? implicit : 0)) << shift) + exponent) - (subnormal ? one : 0);
      out[i / kLanes].lane[i % kLanes] = (codes[i] >> sign ? -value : value) * scale;
    }
  }

  float back() const { return 1; }

  int32_t sign, magnitude, implicit, shift, exponent;
  float one;
};

#include "mx8_tile.inc"

#undef TARGET

}  // namespace portable

#if defined(MLSPECQD_X86)

// The bits of float16s: the code's sign is shifted to the top, then all to the right until the mantissas lie on each other, and the
// copies of the sign that come in between are cleared.
struct InFloat16 {
  explicit InFloat16(Format f)
      : left(_mm_cvtsi32_si128(16 - f.bits())), right(_mm_cvtsi32_si128(5 - f.exponent_bits)),
        kept(static_cast<int16_t>(0x8000 | ((1 << (10 + f.exponent_bits)) - 1))), back_(as_float((127 + 15 - f.bias()) << 23)) {}

  float back() const { return back_; }

  __m128i left, right;
  int16_t kept;
  float back_;
};

// Every processor with AVX2 has F16C.
namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

using namespace registers::avx2;

constexpr int kParts = kBlock / kLanes, kRows = 4;

constexpr int width(int rows) { return rows <= 2 ? 4 : 2; }

struct Decoder : InFloat16 {
  using InFloat16::InFloat16;

  TARGET inline __attribute__((always_inline)) void operator()(const uint8_t* codes, float scale, Vector (&out)[kParts]) const {
    const __m256 factor = _mm256_set1_ps(scale);
    for (int i = 0; i < 2; ++i) {
      const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
      const __m256i bits = _mm256_and_si256(_mm256_sra_epi16(_mm256_sll_epi16(words, left), right), _mm256_set1_epi16(kept));
      out[2 * i] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), factor);
      out[2 * i + 1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)), factor);
    }
  }
};

#include "mx8_tile.inc"

#undef TARGET

}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

using namespace registers::avx512;

constexpr int kParts = kBlock / kLanes, kRows = 8;

constexpr int width(int rows) { return rows <= 4 ? 4 : 2; }

struct Decoder : InFloat16 {
  using InFloat16::InFloat16;

  TARGET inline __attribute__((always_inline)) void operator()(const uint8_t* codes, float scale, Vector (&out)[kParts]) const {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i bits = _mm512_and_si512(_mm512_sra_epi16(_mm512_sll_epi16(words, left), right), _mm512_set1_epi16(kept));
    out[0] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), factor);
    out[1] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), factor);
  }
};

#include "mx8_tile.inc"

#undef TARGET

}  // namespace avx512

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::mx8
