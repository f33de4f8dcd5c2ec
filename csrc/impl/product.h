// Products with packed weights of any format, and rows of such weights.
#pragma once

#include "block_gemm.h"

namespace octavo::OCTAVO_ISA {

inline void product(DType type, const Weight& w, const ProductArgs& a) {
    if (w.parts[0].format == Format::bf16) {
        auto *x = (const bf16*)a.x, *bias = (const bf16*)w.bias;
        return linear({x, (const bf16*)w.parts[0].panels, bias, (bf16*)a.out, a.rows, w.in, w.out, a.x_stride, w.out});
    }
    block_product(type, w, a);
}

// Row `row` of a weight in bf16.
inline void copy_row(const Weight& w, isize row, bf16* out) {
    const isize pairs = w.in / 2;
    auto* panel = (const uint32_t*)w.parts[0].panels + row / kPanel * pairs * kPanel + row % kPanel;
    for (isize k = 0; k < pairs; k++) std::memcpy((void*)(out + 2 * k), panel + k * kPanel, 4);
}

template <class T>
void block_row(const Weight& w, isize row, T* out) {
    const Part* part = w.parts;
    for (; row >= part->out; part++) row -= part->out;
    auto* values = (float*)scratch(Scratch::tile, w.in * sizeof(float));
    unpack_row(*part, w.in, row, values);
    for (isize i = 0; i < w.in; i++) out[i] = narrow<T>(values[i]);
}

inline const char* gather(DType type, const Weight& w, const GatherArgs& a) {
    for (isize t = 0; t < a.count; t++)
        if (a.ids[t] < 0 || a.ids[t] >= w.out) return "a token id is outside of the vocabulary";
    parallel(a.count * w.in >= kParallelFrom, a.count, [&](isize t) {
        if (w.parts[0].format == Format::bf16) copy_row(w, a.ids[t], (bf16*)a.out + t * w.in);
        else if (type == DType::f32) block_row(w, a.ids[t], (float*)a.out + t * w.in);
        else block_row(w, a.ids[t], (bf16*)a.out + t * w.in);
    });
    return nullptr;
}

}  // namespace octavo::OCTAVO_ISA
