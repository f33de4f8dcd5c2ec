// Log-probabilities: of one token of each row of logits, and of the likeliest.
#pragma once

#include "sample.h"
#include "select.h"

namespace octavo::OCTAVO_ISA {

// Descending where the values do, and of equals (as the two zeros are) by ascending position.
OCTAVO_INLINE uint64_t rank_of(float value, isize at) {
    return uint64_t(uint32_t(order_of(value + 0.0f)) ^ 0x80000000u) << 32 | (0xffffffffu - uint32_t(at));
}

// The logarithm of the sum of exp(x - top).
template <class T>
OCTAVO_INLINE double log_mass(const T* x, isize cols, float top) {
    double total = 0;
    for (isize first = 0; first < cols; first += 64 * kLanes) {
        vf part{};
        for (isize i = first; i < cols && i < first + 64 * kLanes; i += kLanes)
            part += vexp(load_row(x, i, cols) - top);
        total += sum(part);
    }
    return ::log(total);
}

// How many of a row are greater than `value`.
template <class T>
OCTAVO_INLINE isize count_above(const T* x, isize cols, float value) {
    vi found{};
    for (isize i = 0; i < cols; i += kLanes) found -= load_row(x, i, cols) > value;
    isize total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += found[lane];
    return total;
}

// The positions of the `count` greatest of a row, in descending order.
template <class T>
OCTAVO_INLINE void likeliest_of(const T* x, isize cols, float top, isize count, int32_t* ids) {
    const isize padded = in_lanes(cols);
    auto* found = (uint64_t*)scratch(Scratch::tile, cols * sizeof(uint64_t) + padded * sizeof(float));
    auto* peaks = (float*)(found + cols);
    const isize groups = group_peaks(padded, peaks, [=](isize i) { return load_row(x, i, cols); });
    const float least = kth_of(peaks, groups, count, -INFINITY, top);
    isize kept = 0;
    for (isize first = 0; first < cols; first += kLanes) {
        const vf v = load_row(x, first, cols);
        if (!any(v >= least)) continue;
        for (isize i = first; i < cols && i < first + kLanes; i++)
            if (v[i - first] >= least) found[kept++] = rank_of(v[i - first], i);
    }
    sort_largest(found, kept, count);
    for (isize i = 0; i < count; i++) ids[i] = int32_t(0xffffffffu - uint32_t(found[i]));
}

template <class T>
void logprobs_row(const LogprobArgs& a, isize row) {
    const T* x = (const T*)a.x + row * a.x_stride;
    int32_t *out = a.out + row * (2 + 2 * a.count), *ids = out + 2;
    auto *own = (float*)out, *values = (float*)(ids + a.count);
    const float top = widen(x[argmax_row(x, a.cols)]), chosen = widen(x[a.tokens[row]]);
    if (!(std::fabs(top) < INFINITY)) {
        *own = NAN, out[1] = 1;
        for (isize i = 0; i < a.count; i++) ids[i] = 0, values[i] = NAN;
        return;
    }
    const float mass = float(log_mass(x, a.cols, top));
    *own = chosen - top - mass;
    out[1] = int32_t(1 + count_above(x, a.cols, chosen));
    if (!a.count) return;
    likeliest_of(x, a.cols, top, a.count, ids);
    for (isize i = 0; i < a.count; i++) values[i] = widen(x[ids[i]]) - top - mass;
}

template <class T>
const char* logprobs_of(const LogprobArgs& a) {
    for (isize row = 0; row < a.rows; row++)
        if (a.tokens[row] < 0 || a.tokens[row] >= a.cols) return "a token is outside of the vocabulary";
    parallel(a.rows * a.cols >= 65536, a.rows, [&](isize row) { logprobs_row<T>(a, row); });
    return nullptr;
}

inline const char* logprobs(DType type, const LogprobArgs& a) {
    return type == DType::f32 ? logprobs_of<float>(a) : logprobs_of<bf16>(a);
}

}  // namespace octavo::OCTAVO_ISA
