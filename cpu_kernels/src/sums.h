// The sums of registers' lanes, each in the one order ((lane + lane 8 further) + 4 further) + 2 further) + 1 further.

#pragma once

#include "target.h"

#if defined(MLSPECQD_X86)

namespace mlspecqd {

__attribute__((target("avx2"))) inline float lane_sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// out[i] = the sum of v[i]'s lanes, four at a time: in half as many instructions as one by one.
template <int N>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))) inline void lane_sums(const __m512* v, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 4) {
    const __m512 a = v[i], b = i + 1 < N ? v[i + 1] : a, c = i + 2 < N ? v[i + 2] : a, d = i + 3 < N ? v[i + 3] : a;
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    const __m128 four = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s));
    _mm_mask_storeu_ps(out + i, static_cast<__mmask8>(N - i < 4 ? (1 << (N - i)) - 1 : 15), four);
  }
}

}  // namespace mlspecqd

#endif  // MLSPECQD_X86
