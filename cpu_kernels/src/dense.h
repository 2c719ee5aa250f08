// dense_matmul: x [M, K] by w [N, K], both bfloat16, float16 or float32, to f32 [M, N], once for each instruction set and type.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "floats.h"
#include "registers.h"

namespace mlspecqd::dense {

constexpr int64_t kNear = 256;  // elements

// One instruction set's product for one type: rows are prepared in blocks of `rows`, each of `activation_bytes` for every element
// of K, rounded up to `step`; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t step;
  int64_t activation_bytes;
  void (*prepare)(const void* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const void* w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride);
};

namespace portable {

#define TARGET
#define KEEP(a)

using Activation = float;
constexpr int kStep = 8, kParts = 1, kRows = 4;

using namespace registers::portable;

constexpr int width(int) { return 2; }

template <class Element>
inline Vector weight(const Element* w, int) {
  Vector v;
  for (int i = 0; i < kStep; ++i) v.lane[i] = widened(w[i]);
  return v;
}

inline const float* activation(const float* x, int) { return load(x); }

template <class Element>
inline void prepare_step(const Element* x, float* out) {
  for (int i = 0; i < kStep; ++i) out[i] = widened(x[i]);
}

namespace bf16 {
using Element = Bf16;
#include "dense_tile.inc"
}  // namespace bf16

namespace f16 {
using Element = Half;
#include "dense_tile.inc"
}  // namespace f16

namespace f32 {
using Element = float;
#include "dense_tile.inc"
}  // namespace f32

#undef TARGET
#undef KEEP

}  // namespace portable

#if defined(MLSPECQD_X86)

#define KEEP(a) asm("" : "+v"(a))

// Without bfloat16 instructions a register of pairs becomes two of f32, the even elements and the odd ones, and rows of x are
// prepared in that order.
namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

using namespace registers::avx2;
using Activation = float;
constexpr int kRows = 4;

constexpr int width(int rows) { return rows <= 2 ? 4 : 2; }

TARGET inline Vector activation(const float* x, int part) { return load(x + kLanes * part); }

TARGET inline Vector weight(const Bf16* w, int part) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

TARGET inline Vector weight(const Half* w, int) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))); }

TARGET inline Vector weight(const float* w, int) { return _mm256_loadu_ps(w); }

template <class Element>
TARGET inline void prepare_step(const Element* x, float* out) {
  _mm256_storeu_ps(out, weight(x, 0));
}

TARGET inline void prepare_step(const Bf16* x, float* out) {
  _mm256_storeu_ps(out, weight(x, 0));
  _mm256_storeu_ps(out + 8, weight(x, 1));
}

namespace bf16 {
using Element = Bf16;
constexpr int kStep = 16, kParts = 2;
#include "dense_tile.inc"
}  // namespace bf16

namespace f16 {
using Element = Half;
constexpr int kStep = 8, kParts = 1;
#include "dense_tile.inc"
}  // namespace f16

namespace f32 {
using Element = float;
constexpr int kStep = 8, kParts = 1;
#include "dense_tile.inc"
}  // namespace f32

#undef TARGET

}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

using namespace registers::avx512;
using Activation = float;
constexpr int kRows = 8;

constexpr int width(int rows) { return rows <= 6 ? 4 : 3; }

TARGET inline Vector activation(const float* x, int part) { return load(x + kLanes * part); }

TARGET inline Vector weight(const Bf16* w, int part) {
  const __m512i pairs = _mm512_loadu_si512(w);
  return _mm512_castsi512_ps(part == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

TARGET inline Vector weight(const Half* w, int) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }

TARGET inline Vector weight(const float* w, int) { return _mm512_loadu_ps(w); }

template <class Element>
TARGET inline void prepare_step(const Element* x, float* out) {
  _mm512_storeu_ps(out, weight(x, 0));
}

TARGET inline void prepare_step(const Bf16* x, float* out) {
  _mm512_storeu_ps(out, weight(x, 0));
  _mm512_storeu_ps(out + 16, weight(x, 1));
}

namespace bf16 {
using Element = Bf16;
constexpr int kStep = 32, kParts = 2;
#include "dense_tile.inc"
}  // namespace bf16

namespace f16 {
using Element = Half;
constexpr int kStep = 16, kParts = 1;
#include "dense_tile.inc"
}  // namespace f16

namespace f32 {
using Element = float;
constexpr int kStep = 16, kParts = 1;
#include "dense_tile.inc"
}  // namespace f32

#undef TARGET

}  // namespace avx512

namespace avx512bf16::bf16 {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")))

using Element = Bf16;
using registers::avx512::sums, registers::avx512::Vector, registers::avx512::zero;
using Activation = Bf16;
constexpr int kStep = 32, kParts = 1, kRows = 8;

constexpr int width(int rows) { return rows <= 6 ? 4 : 3; }

TARGET inline __m512bh weight(const Bf16* w, int) { return (__m512bh)_mm512_loadu_si512(w); }

TARGET inline __m512bh activation(const Bf16* x, int) { return (__m512bh)_mm512_loadu_si512(x); }

TARGET inline Vector fma(__m512bh a, __m512bh b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }

TARGET inline void prepare_step(const Bf16* x, Bf16* out) { std::memcpy(out, x, kStep * sizeof *x); }

#include "dense_tile.inc"

#undef TARGET

}  // namespace avx512bf16::bf16

#undef KEEP

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::dense
