// Products in which each row has a weight of its own, that of its expert, and the sum of what a token's experts say.
#pragma once

#include "gemm.h"

namespace octavo::OCTAVO_ISA {

// Up to kBlockRows rows of one expert.
struct ExpertBlock {
    isize expert, first, rows;
};

// The blocks of all experts that have rows, one after the other; returns how many there are.
inline isize expert_blocks(const GroupedArgs& a, isize experts, ExpertBlock* blocks) {
    isize count = 0;
    for (isize e = 0; e < experts; e++)
        for (isize first = a.starts[e]; first < a.starts[e + 1]; first += kBlockRows) {
            const isize left = a.starts[e + 1] - first;
            blocks[count++] = {e, first, left < kBlockRows ? left : kBlockRows};
        }
    return count;
}

// Of an expert with few rows the weight is streamed, as `linear` does it: the sums are the same to the last bit however
// many rows there are.
template <int PANELS>
void run_expert(const LinearArgs& a, isize panel) {
    if (a.rows > kStreamRows) return run_unit<PANELS>(a, {0, a.rows, panel}, a.panels + panel * a.in * kPanel);
    with_rows(int(a.rows), [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        if constexpr (ROWS <= kStreamRows) stream_panels<ROWS, PANELS>(a, panel);
    });
}

inline void grouped(const ExpertWeight& w, const GroupedArgs& a) {
    const isize sorted = a.starts[w.experts];  // rows that have an expert
    const isize panels = (w.out + kPanel - 1) / kPanel, groups = (panels + kUnitPanels - 1) / kUnitPanels;
    const isize most = sorted / kBlockRows + (w.experts < sorted ? w.experts : sorted);
    auto* blocks = (ExpertBlock*)scratch(Scratch::items, (most + 1) * sizeof(ExpertBlock));
    const isize count = expert_blocks(a, w.experts, blocks);
    auto* x = (const bf16*)a.x;
    isize stride = a.x_stride;
    if (a.rows) {
        auto* gathered = (bf16*)scratch(Scratch::layer, (sorted * w.in + 1) * sizeof(bf16));
        parallel(sorted * w.in >= kParallelFrom, sorted, [&](isize i) {
            std::memcpy((void*)(gathered + i * w.in), x + a.rows[i] * stride, w.in * sizeof(bf16));
        });
        x = gathered, stride = w.in;
    }
    parallel(count * groups > 1, count * groups, [&](isize u) {
        const ExpertBlock& b = blocks[u / groups];
        const isize panel = u % groups * kUnitPanels;
        const LinearArgs l{x + b.first * stride,
                           (const bf16*)w.panels + b.expert * panels * kPanel * w.in,
                           w.bias ? (const bf16*)w.bias + b.expert * w.out : nullptr,
                           (bf16*)a.out + b.first * w.out,
                           b.rows, w.in, w.out, stride, w.out};
        with_panels<kUnitPanels>(panels - panel < kUnitPanels ? panels - panel : kUnitPanels,
                                 [&](auto width) { run_expert<decltype(width)::value>(l, panel); });
    });
}

template <class T>
void combine_row(const CombineArgs& a, isize token) {
    auto* y = (const T*)a.y;
    auto* out = (T*)a.out + token * a.cols;
    const int32_t* places = a.places + token * a.each;
    const float* weights = a.weights + token * a.each;
    for (isize i = 0; i < a.cols; i += kLanes) {
        const isize left = a.cols - i < kLanes ? a.cols - i : kLanes;
        vf sum{};
        for (isize j = 0; j < a.each; j++) {
            if (places[j] < 0) continue;
            const T* row = y + places[j] * a.cols + i;
            if (left == kLanes) sum += splat(weights[j]) * load(row);
            else
                for (isize k = 0; k < left; k++) sum[k] += weights[j] * widen(row[k]);
        }
        if (left == kLanes) store(out + i, sum);
        else
            for (isize k = 0; k < left; k++) out[i + k] = narrow<T>(sum[k]);
    }
}

inline void combine(DType type, const CombineArgs& a) {
    parallel(a.tokens > 1 && a.tokens * a.each * a.cols >= kParallelFrom, a.tokens, [&](isize token) {
        type == DType::f32 ? combine_row<float>(a, token) : combine_row<bf16>(a, token);
    });
}

}  // namespace octavo::OCTAVO_ISA
