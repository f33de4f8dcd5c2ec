// One vector type in the natural width of the instruction set, written with the compilers' vector extensions, so that
// the same source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OCTAVO_INLINE static inline __attribute__((always_inline))
#define OCTAVO_DOT __attribute__((always_inline))

namespace octavo::OCTAVO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPanelVecs = kPanel / kLanes;

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

struct bf16 {
    uint16_t bits;
};

OCTAVO_INLINE float widen(float x) { return x; }
OCTAVO_INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

OCTAVO_INLINE bf16 round_to_bf16(float x) {
    if (x != x) return {0x7fc0};
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T>
OCTAVO_INLINE T narrow(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else return round_to_bf16(x);
}

OCTAVO_INLINE vf splat(float x) { return x - vf{}; }
OCTAVO_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
OCTAVO_INLINE vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
OCTAVO_INLINE vu load_u32(const void* p) {
    vu v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
OCTAVO_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Rounds to the nearest bf16, ties to even.
OCTAVO_INLINE vh to_bf16(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
#endif
}
OCTAVO_INLINE void store(bf16* p, vf v) {
    vh h = to_bf16(v);
    std::memcpy(p, &h, sizeof h);
}

// The value that storing as T and loading again gives: torch rounds between operators, and so do fused kernels.
template <class T>
OCTAVO_INLINE vf rounded(vf v) {
    if constexpr (sizeof(T) == 4) return v;
    else return (vf)(__builtin_convertvector(to_bf16(v), vu) << 16);
}
template <class T>
OCTAVO_INLINE float rounded(float v) {
    return widen(narrow<T>(v));
}

// Whether a lane of a mask is set.
OCTAVO_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    uint64_t halves[2];
    std::memcpy(halves, &mask, sizeof halves);
    return (halves[0] | halves[1]) != 0;
#endif
}

OCTAVO_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
// Where either is not a number, the result is b.
OCTAVO_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
OCTAVO_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}

OCTAVO_INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
OCTAVO_INLINE float max(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// exp with the constants of Cephes' expf (relative error about 2e-7); below -87 the result is 0.
OCTAVO_INLINE vf vexp(vf x) {
    vi tiny = x < -87.0f;
    x = vmin(splat(88.0f), vmax(splat(-87.0f), x));
    vf n = x * 1.44269504088896341f + 12582912.0f;  // rounds to the nearest integer
    vi exponent = (vi)n << 23;
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)((vf)((vi)p + exponent)) & ~tiny);
}
constexpr float kLog2e = 1.44269504088896341f;

// 2^x for x up to 127, by a polynomial in what is left of x beside an integer (relative error 1e-7); below -126 it is 0.
OCTAVO_INLINE vf vexp2(vf x) {
#if defined(__AVX512F__)
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vi tiny = x < -126.0f;
    x = vmax(splat(-126.0f), x);
    vf n = x + 12582912.0f;  // rounds to the nearest integer
    const vi exponent = (vi)n << 23;
    n -= 12582912.0f;
#endif
    const vf r = x - n;
    vf p = splat(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p,
                                      (__m512)n);
#else
    return (vf)((vi)((vf)((vi)p + exponent)) & ~tiny);
#endif
}
OCTAVO_INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (1.0f + vexp(2.0f * x)); }

// Below this many elements a second thread costs more than it saves.
constexpr isize kParallelFrom = 16384;

// f(i) for every i below count, by several threads if that is worth it.
template <class F>
OCTAVO_INLINE void parallel(bool worth, isize count, F f) {
    auto piece = [](void* context, isize first, isize last) {
        for (isize i = first; i < last; i++) (*(F*)context)(i);
    };
    if (worth && count > 1) share(count, piece, &f);
    else piece(&f, 0, count);
}

}  // namespace octavo::OCTAVO_ISA
