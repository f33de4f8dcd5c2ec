// acc += the dot products of 4 neighbouring bytes of w (without a sign) and x (with one), a 32-bit lane each.
#pragma once

#include "vec.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace octavo::OCTAVO_ISA {

// Four bytes of x in every lane.
OCTAVO_INLINE vi splat_quad(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return quad - vi{};
}

// BITS: of w. Up to 7, sums of two products fit 16 bits, which saves AVX2 half of the work.
template <int BITS>
OCTAVO_INLINE vi dot8(vi acc, vu w, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__)
    if constexpr (BITS < 8)
        return acc + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), _mm512_set1_epi16(1));
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), odd = _mm512_srai_epi16((__m512i)x, 8);
    return acc + (vi)_mm512_madd_epi16((__m512i)(w & 0x00ff00ff), even) +
           (vi)_mm512_madd_epi16((__m512i)(w >> 8 & 0x00ff00ff), odd);
#elif defined(__AVX2__)
    if constexpr (BITS < 8)
        return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), _mm256_set1_epi16(1));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), odd = _mm256_srai_epi16((__m256i)x, 8);
    return acc + (vi)_mm256_madd_epi16((__m256i)(w & 0x00ff00ff), even) +
           (vi)_mm256_madd_epi16((__m256i)(w >> 8 & 0x00ff00ff), odd);
#elif defined(__ARM_FEATURE_DOTPROD)
    if constexpr (BITS < 8) return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x);
    const int32x4_t shifted = vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ 0x80808080u), (int8x16_t)x);
    const int8x16_t half = vdupq_n_s8(64);  // twice: w was 128 more
    return (vi)vdotq_s32(vdotq_s32(shifted, half, (int8x16_t)x), half, (int8x16_t)x);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) acc += (vi)(w >> 8 * i & 0xff) * (x << (24 - 8 * i) >> 24);
    return acc;
#endif
}

}  // namespace octavo::OCTAVO_ISA
