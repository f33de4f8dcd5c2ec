// The greatest and the likeliest of each row of logits.
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

constexpr isize kRun = 16;  // logits whose greatest is kept

// x / temperature, filled up with -inf to whole runs, and the greatest of each run. Returns the greatest of all; NaN if
// there is one.
template <class T>
OCTAVO_INLINE float scaled_row(const T* x, float temperature, isize cols, float* values, float* peaks) {
    vi odd{};
    float top = -INFINITY;
    for (isize first = 0; first < cols; first += kRun) {
        float* run = values + first;
        if (first + kRun <= cols)
            for (isize i = 0; i < kRun; i += kLanes) store(run + i, load(x + first + i) / temperature);
        else
            for (isize i = 0; i < kRun; i++) run[i] = first + i < cols ? widen(x[first + i]) / temperature : -INFINITY;
        vf best = splat(-INFINITY);
        for (isize i = 0; i < kRun; i += kLanes) {
            const vf v = load(run + i);
            odd |= v != v;
            best = vmax(v, best);
        }
        const float peak = max(best);
        peaks[first / kRun] = peak;
        if (peak > top) top = peak;
    }
    for (int lane = 0; lane < kLanes; lane++)
        if (odd[lane]) return NAN;
    return top;
}

// Descending where the values do, and of equals by ascending position.
OCTAVO_INLINE uint64_t rank_of(float value, isize at) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(at));
}

// The likeliest of a row, see LeadArgs, without sorting all: as many runs as tokens are wanted have a greatest that
// reaches some value, so as many tokens reach it, and few more.
template <class T>
void lead_row(const LeadArgs& a, isize row) {
    const isize runs = (a.cols + kRun - 1) / kRun;
    auto* values = (float*)scratch(Scratch::tile, runs * (kRun * 12 + 8));
    float *peaks = values + runs * kRun, *order = peaks + runs;
    auto* found = (uint64_t*)(order + runs);
    float* probs = a.probs + row * a.count;
    int64_t* ids = a.ids + row * a.count;
    const float top = scaled_row((const T*)a.x + row * a.x_stride, a.temperature[row], a.cols, values, peaks);
    if (!(std::fabs(top) < INFINITY)) {
        for (isize i = 0; i < a.count; i++) probs[i] = NAN, ids[i] = 0;
        return;
    }
    double total = 0;
    for (isize first = 0; first < runs * kRun; first += 1024) {
        vf part{};
        for (isize i = first; i < runs * kRun && i < first + 1024; i += kLanes) part += vexp(load(values + i) - top);
        total += sum(part);
    }
    std::memcpy(order, peaks, runs * sizeof(float));
    const float least = runs > a.count ? kth_largest(order, runs, a.count) : -INFINITY;
    isize count = 0;
    for (isize run = 0; run < runs; run++)
        if (peaks[run] >= least)
            for (isize i = run * kRun; i < run * kRun + kRun && i < a.cols; i++)
                if (values[i] >= least) found[count++] = rank_of(values[i], i);
    sort_largest(found, count, a.count);
    for (isize i = 0; i < a.count; i++) {
        ids[i] = 0xffffffffu - uint32_t(found[i]);
        probs[i] = vexp(splat(values[ids[i]] - top))[0] / float(total);
    }
}

template <class T>
void lead_of(const LeadArgs& a) {
    parallel(a.rows * a.cols >= 65536, a.rows, [&](isize row) { lead_row<T>(a, row); });
}

inline void lead(DType type, const LeadArgs& a) { type == DType::f32 ? lead_of<float>(a) : lead_of<bf16>(a); }

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
