// Registers of f32 lanes as the tiles of the products use them, once for each instruction set: zero, load, a fused multiply-add,
// and the sums of lanes in one fixed order.

#pragma once

#include "sums.h"
#include "target.h"

namespace mlspecqd::registers {

namespace portable {

constexpr int kLanes = 8;

struct Vector {
  float lane[kLanes];
};

inline Vector zero() { return {}; }

inline const float* load(const float* x) { return x; }

inline Vector fma(const float* a, const Vector& b, Vector c) {
  for (int i = 0; i < kLanes; ++i) {
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

}  // namespace portable

#if defined(MLSPECQD_X86)

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

using Vector = __m256;
constexpr int kLanes = 8;

TARGET inline Vector zero() { return _mm256_setzero_ps(); }

TARGET inline Vector load(const float* x) { return _mm256_loadu_ps(x); }

TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

template <int N>
TARGET inline void sums(const Vector* v, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out[i] = lane_sum(v[i]);
}

#undef TARGET

}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

using Vector = __m512;
constexpr int kLanes = 16;

TARGET inline Vector zero() { return _mm512_setzero_ps(); }

TARGET inline Vector load(const float* x) { return _mm512_loadu_ps(x); }

TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

template <int N>
TARGET inline void sums(const Vector* v, float* out) {
  lane_sums<N>(v, out);
}

#undef TARGET

}  // namespace avx512

#endif  // MLSPECQD_X86

}  // namespace mlspecqd::registers
