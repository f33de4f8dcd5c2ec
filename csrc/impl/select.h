// The k-th of many without sorting them: how many reach a value is counted faster than they are moved, and some thirty
// counts find the value.
#pragma once

#include "vec.h"

namespace octavo::OCTAVO_ISA {

// An int that orders as the float does; and, being its own inverse, the float of such an int.
OCTAVO_INLINE int32_t flipped(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
OCTAVO_INLINE int32_t order_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return flipped(bits);
}
OCTAVO_INLINE float float_of(int32_t order) {
    const int32_t bits = flipped(order);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Halfway between two floats in their order: above low, and up to high.
OCTAVO_INLINE float between(float low, float high) {
    const int64_t first = order_of(low), last = order_of(high);
    return float_of(int32_t(first + (last - first + 1) / 2));
}
// The next lower float.
OCTAVO_INLINE float below(float x) { return float_of(order_of(x) - 1); }

// How many of `values` are at least `least`; count is a multiple of kLanes.
OCTAVO_INLINE isize count_from(const float* values, isize count, float least) {
    vi found{};
    for (isize i = 0; i < count; i += kLanes) found -= load(values + i) >= least;
    isize total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += found[lane];
    return total;
}

// The k-th largest of those of `values` from low to high; low if they are fewer.
OCTAVO_INLINE float kth_of(const float* values, isize count, isize k, float low, float high) {
    while (low < high) {
        const float t = between(low, high);
        if (count_from(values, count, t) >= k) low = t;
        else high = below(t);
    }
    return low;
}

constexpr isize kGroup = 16;  // values whose greatest is kept

// The greatest of each group of `values(i)`, which are those from i on, below `count`, a multiple of kLanes. Returns
// how many, at most count. As many tokens as groups reach a value: a bound on the k-th that is found among few.
template <class V>
OCTAVO_INLINE isize group_peaks(isize count, float* peaks, V values) {
    isize groups = 0;
    for (isize first = 0; first < count; first += kGroup * kLanes, groups += kLanes) {
        vf peak = values(first);
        for (isize i = first + kLanes; i < count && i < first + kGroup * kLanes; i += kLanes)
            peak = vmax(values(i), peak);
        store(peaks + groups, peak);
    }
    return groups;
}

// `count` rounded up to whole vectors.
constexpr isize in_lanes(isize count) { return (count + kLanes - 1) / kLanes * kLanes; }

// x[first] and on, with -inf from `cols` on.
template <class T>
OCTAVO_INLINE vf load_row(const T* x, isize first, isize cols) {
    if (first + kLanes <= cols) return load(x + first);
    vf v = splat(-INFINITY);
    for (isize i = first; i < cols; i++) v[i - first] = widen(x[i]);
    return v;
}

}  // namespace octavo::OCTAVO_ISA
