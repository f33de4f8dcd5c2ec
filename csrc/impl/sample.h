// The greatest of each row of logits.
#pragma once

#include "vec.h"

namespace octavo::OCTAVO_ISA {

template <class T>
bool has_nan(const T* x, isize count) {
    for (isize i = 0; i < count; i++)
        if (widen(x[i]) != widen(x[i])) return true;
    return false;
}

// The lowest position of the greatest value; of the first NaN, if there is one. First the block it is in: comparing
// positions all along would cost as much as reading.
template <class T>
OCTAVO_INLINE isize argmax_row(const T* x, isize cols) {
    constexpr isize kBlock = 512;
    float top = -INFINITY;
    isize found = 0;
    bool odd = false;  // a NaN was seen
    for (isize first = 0; first < cols && !odd; first += kBlock) {
        const isize last = first + kBlock < cols ? first + kBlock : cols;
        vf best = splat(-INFINITY), nan{};
        isize i = first;
        for (; i + kLanes <= last; i += kLanes) {
            vf v = load(x + i);
            nan += v - v;  // 0, or NaN from a NaN or an infinity
            best = vmax(v, best);
        }
        float here = max(best);
        odd = sum(nan) != 0;
        for (; i < last; i++) {
            float v = widen(x[i]);
            odd |= v != v;
            if (v > here) here = v;
        }
        if (odd) odd = has_nan(x + first, last - first);
        if (here > top || odd) top = here, found = first;
    }
    for (isize i = found; i < cols; i++) {
        float v = widen(x[i]);
        if (odd ? v != v : v == top) return i;
    }
    return 0;
}

template <class T>
void argmax_of(const ArgmaxArgs& a) {
    parallel(a.rows * a.cols >= 65536, a.rows, [&](isize row) {
        a.out[row] = argmax_row((const T*)a.x + row * a.x_stride, a.cols);
    });
}

template <class T>
void greedy_of(const GreedyArgs& a) {
    parallel(a.rows * a.cols >= 65536, a.rows, [&](isize row) {
        const T* x = (const T*)a.x + row * a.x_stride;
        const isize found = argmax_row(x, a.cols);
        const bool finite = std::fabs(widen(x[found])) < INFINITY;
        a.out[row] = finite ? int32_t(found) : 0, a.out[a.rows + row] = finite;
    });
}

inline void greedy(DType type, const GreedyArgs& a) { type == DType::f32 ? greedy_of<float>(a) : greedy_of<bf16>(a); }

inline void argmax(DType type, const ArgmaxArgs& a) { type == DType::f32 ? argmax_of<float>(a) : argmax_of<bf16>(a); }

}  // namespace octavo::OCTAVO_ISA
