// bf16_matmul: x [M, K] by w [N, K], both bfloat16 (as uint16_t), to f32 [M, N], once for each instruction set.

#pragma once

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "sums.h"

namespace mlspecqd::bf16 {

constexpr int64_t kNear = 256;  // elements

// One instruction set's product: rows are prepared in blocks of `rows`, each of `activation_bytes` for every element of K, rounded up
// to `step`; then any range of columns may be computed.
struct Kernel {
  int rows;
  int64_t step;
  int64_t activation_bytes;
  void (*prepare)(const uint16_t* x, int rows, int64_t k, void* out);
  void (*product)(const void* x, int rows, const uint16_t* w, int64_t k, int64_t begin, int64_t end, float* out, int64_t stride);
};

#define MLSPECQD_KERNEL                                                                                             \
  inline constexpr Kernel kernel = {                                                                                \
      kRows, kStep, sizeof(Activation),                                                                             \
      [](const uint16_t* x, int rows, int64_t k, void* out) { prepare(x, rows, k, static_cast<Activation*>(out)); }, \
      [](const void* x, int rows, const uint16_t* w, int64_t k, int64_t begin, int64_t end, float* out, int64_t n) { \
        product(static_cast<const Activation*>(x), rows, w, k, begin, end, out, n);                                 \
      }};

namespace portable {

#define TARGET
#define KEEP(a)
#define FOUR_ROWS

using Activation = float;
constexpr int kStep = 8, kParts = 1, kRows = 4;

struct Vector {
  float lane[kStep];
};

constexpr int width(int) { return 2; }

inline Vector zero() { return {}; }

inline Vector weight(const uint16_t* w, int) {
  Vector v;
  for (int i = 0; i < kStep; ++i) v.lane[i] = widened(w[i]);
  return v;
}

inline const float* activation(const float* x, int) { return x; }

inline Vector fma(const float* a, const Vector& b, Vector c) {
  for (int i = 0; i < kStep; ++i) {
#if defined(__FP_FAST_FMAF)
    c.lane[i] = __builtin_fmaf(a[i], b.lane[i], c.lane[i]);
#else
    c.lane[i] += a[i] * b.lane[i];
#endif
  }
  return c;
}

template <int N>
inline void sums(const Vector* v, float* out) {
  for (int i = 0; i < N; ++i) {
    const float* a = v[i].lane;
    out[i] = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
  }
}

inline void prepare_step(const uint16_t* x, float* out) {
  for (int i = 0; i < kStep; ++i) out[i] = widened(x[i]);
}

#include "bf16_tile.inc"
MLSPECQD_KERNEL

#undef TARGET
#undef KEEP
#undef FOUR_ROWS

}  // namespace portable

#if defined(MLSPECQD_X86)

// Without bfloat16 instructions a register of pairs becomes two of f32, the even elements and the odd ones, and rows of x are
// prepared in that order.
namespace avx2 {

#define KEEP(a) asm("" : "+v"(a))
#define TARGET __attribute__((target("avx2,fma")))
#define FOUR_ROWS

using Vector = __m256;
using Activation = float;
constexpr int kStep = 16, kParts = 2, kRows = 4;

constexpr int width(int rows) { return rows <= 2 ? 4 : 2; }

TARGET inline Vector zero() { return _mm256_setzero_ps(); }

TARGET inline Vector weight(const uint16_t* w, int part) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

TARGET inline Vector activation(const float* x, int part) { return _mm256_loadu_ps(x + 8 * part); }

TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

template <int N>
TARGET inline void sums(const Vector* v, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out[i] = lane_sum(v[i]);
}

TARGET inline void prepare_step(const uint16_t* x, float* out) {
  _mm256_storeu_ps(out, weight(x, 0));
  _mm256_storeu_ps(out + 8, weight(x, 1));
}

#include "bf16_tile.inc"
MLSPECQD_KERNEL

#undef TARGET
#undef KEEP
#undef FOUR_ROWS

}  // namespace avx2

namespace avx512 {

#define KEEP(a) asm("" : "+v"(a))
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

using Vector = __m512;
using Activation = float;
constexpr int kStep = 32, kParts = 2, kRows = 8;

constexpr int width(int rows) { return rows <= 6 ? 4 : 3; }

TARGET inline Vector zero() { return _mm512_setzero_ps(); }

TARGET inline Vector weight(const uint16_t* w, int part) {
  const __m512i pairs = _mm512_loadu_si512(w);
  return _mm512_castsi512_ps(part == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

TARGET inline Vector activation(const float* x, int part) { return _mm512_loadu_ps(x + 16 * part); }

TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

template <int N>
TARGET inline void sums(const Vector* v, float* out) {
  lane_sums<N>(v, out);
}

TARGET inline void prepare_step(const uint16_t* x, float* out) {
  _mm512_storeu_ps(out, weight(x, 0));
  _mm512_storeu_ps(out + 16, weight(x, 1));
}

#include "bf16_tile.inc"
MLSPECQD_KERNEL

#undef TARGET
#undef KEEP

}  // namespace avx512

namespace avx512bf16 {

#define KEEP(a) asm("" : "+v"(a))
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")))

using Vector = __m512;
using Activation = uint16_t;
constexpr int kStep = 32, kParts = 1, kRows = 8;

constexpr int width(int rows) { return rows <= 6 ? 4 : 3; }

TARGET inline Vector zero() { return _mm512_setzero_ps(); }

TARGET inline __m512bh weight(const uint16_t* w, int) { return (__m512bh)_mm512_loadu_si512(w); }

TARGET inline __m512bh activation(const uint16_t* x, int) { return (__m512bh)_mm512_loadu_si512(x); }

TARGET inline Vector fma(__m512bh a, __m512bh b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }

template <int N>
TARGET inline void sums(const Vector* v, float* out) {
  lane_sums<N>(v, out);
}

TARGET inline void prepare_step(const uint16_t* x, uint16_t* out) { std::memcpy(out, x, kStep * sizeof *x); }

#include "bf16_tile.inc"
MLSPECQD_KERNEL

#undef TARGET
#undef KEEP

}  // namespace avx512bf16

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::bf16
