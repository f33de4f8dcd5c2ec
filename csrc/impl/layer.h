// A decoder layer, or all of them, in one call: what is left of a step's cost besides the products would else be Python's.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "product.h"

namespace octavo::OCTAVO_ISA {

// Norms (where there are any) and rotates the heads of the projection, and writes K and V to their slots. Queries stay
// where they are, in rows of `width`.
inline void place_heads(const LayerArgs& layer, const LayerInput& in, bf16* qkv, isize width) {
    const AttentionArgs& a = in.step;
    const isize dim = a.dim, tile = a.page_size * dim, half = in.rotated / 2;
    const isize queries = a.heads * dim, keys = a.kv_heads * dim;
    auto prepare = [&](const bf16* from, bf16* to, const void* weight, const float* cos) {
        if (weight) {
            norm_row<bf16>(from, nullptr, (const bf16*)weight, to, nullptr, dim, layer.eps);
            from = to;
        }
        if (cos) rotate(from, to, cos, cos + half, half, dim);
        else if (from != to) std::memcpy((void*)to, from, dim * sizeof(bf16));
    };
    parallel(a.tokens * width >= kParallelFrom, a.tokens, [&](isize t) {
        bf16* row = qkv + t * width;
        const float* cos = in.cos_sin ? in.cos_sin + in.positions[t] * in.rotated : nullptr;
        for (isize h = 0; h < queries; h += dim) prepare(row + h, row + h, layer.q_norm, cos);
        const isize slot = in.slots[t];
        bf16* page = (bf16*)a.cache + slot / a.page_size * 2 * a.kv_heads * tile + slot % a.page_size * dim;
        for (isize h = 0; h < a.kv_heads; h++) {
            prepare(row + queries + h * dim, page + h * tile, layer.k_norm, cos);
            std::memcpy((void*)(page + (a.kv_heads + h) * tile), row + queries + keys + h * dim, dim * sizeof(bf16));
        }
    });
}

inline const char* check(const LayerInput& in) {
    const AttentionArgs& a = in.step;
    for (isize t = 0; t < a.tokens; t++) {
        if (in.slots[t] < 0 || in.slots[t] >= a.pages * a.page_size) return "a slot is outside of the KV cache";
        if (in.cos_sin && (in.positions[t] < 0 || in.positions[t] >= in.max_len))
            return "a position is outside of the rotary table";
    }
    return check(a);
}

inline void multiply(const Weight& w, const bf16* x, bf16* out, isize rows) {
    product(DType::bf16, w, {x, out, rows, w.in});
}

// Tokens in ascending order.
struct Tokens {
    const int32_t* at;
    isize count;
};

inline const char* check(const Tokens& tokens, const AttentionArgs& a) {
    const isize first = a.query_start[0], end = a.query_start[a.items];
    for (isize i = 0; i < tokens.count; i++)
        if (tokens.at[i] < (i ? tokens.at[i - 1] + 1 : first) || tokens.at[i] >= end)
            return "wanted tokens are not tokens of the step in ascending order";
    return nullptr;
}

// Moves the rows of some tokens, at the same place or another, to the front.
inline void gather_rows(const bf16* from, isize from_stride, const Tokens& tokens, bf16* to, isize stride, isize size) {
    for (isize i = 0; i < tokens.count; i++)
        std::memmove((void*)(to + i * stride), from + tokens.at[i] * from_stride, size * sizeof(bf16));
}

// A step in which each of `tokens` is the one query of an item.
inline AttentionArgs single_queries(AttentionArgs a, const Tokens& tokens) {
    auto* memory = (int32_t*)scratch(Scratch::singles, (3 * tokens.count + 1) * sizeof(int32_t));
    int32_t *start = memory, *length = start + tokens.count + 1, *row = length + tokens.count;
    for (isize i = 0, b = 0; i < tokens.count; i++) {
        while (tokens.at[i] >= a.query_start[b + 1]) b++;
        start[i] = int32_t(i), row[i] = a.rows[b];
        length[i] = a.seq_lens[b] - (a.query_start[b + 1] - 1 - tokens.at[i]);
    }
    start[tokens.count] = int32_t(tokens.count);
    a.query_start = start, a.seq_lens = length, a.rows = row, a.items = a.tokens = tokens.count;
    return a;
}

// `in` has been checked. Its `out` and `sum` may be its `x` and `residual`. With `wanted` they have a row for each of
// these tokens alone: of the others nothing but K and V is computed.
inline void run_layer(const LayerArgs& l, const LayerInput& in, const Tokens* wanted = nullptr) {
    AttentionArgs a = in.step;
    isize rows = a.tokens;
    const isize size = l.qkv.in, inner = l.down.in;
    const isize wide = l.qkv.out > l.gate_up.out ? l.qkv.out : l.gate_up.out;
    const isize narrow = l.o.in > inner ? l.o.in : inner;
    // Rows of the projections, of what comes out of attention or activation, of the hidden state, of the residual.
    auto* projected = (bf16*)scratch(Scratch::layer, rows * (wide + narrow + 2 * size) * sizeof(bf16));
    bf16 *mixed = projected + rows * wide, *hidden = mixed + rows * narrow, *sum = hidden + rows * size;
    auto* before = (const bf16*)(in.residual ? sum : in.x);

    norm(DType::bf16, {in.x, in.residual, l.input_norm, hidden, sum, rows, size, size, size, l.eps});
    multiply(l.qkv, hidden, projected, rows);
    place_heads(l, in, projected, l.qkv.out);
    if (wanted) {
        gather_rows(projected, l.qkv.out, *wanted, projected, l.qkv.out, l.o.in);
        gather_rows(before, size, *wanted, sum, size, size);
        a = single_queries(a, *wanted), before = sum, rows = wanted->count;
        if (!rows) return;
    }
    a.query = projected, a.query_stride = l.qkv.out, a.out = mixed;
    attention_of<bf16>(a);
    multiply(l.o, mixed, hidden, rows);
    norm(DType::bf16, {hidden, before, l.post_norm, hidden, in.sum, rows, size, size, size, l.eps});
    multiply(l.gate_up, hidden, projected, rows);
    gate(DType::bf16, {projected, mixed, rows, inner, 2 * inner, l.gate});
    multiply(l.down, mixed, (bf16*)in.out, rows);
}

inline const char* layer(const LayerArgs& l, const LayerInput& in) {
    if (const char* wrong = check(in)) return wrong;
    run_layer(l, in);
    return nullptr;
}

inline const char* decoder(const DecoderArgs& d, const DecoderInput& in) {
    for (isize k = 0; k < in.kind_count; k++)
        if (const char* wrong = check(in.kinds[k])) return wrong;
    const isize rows = in.kinds[0].step.tokens, size = d.layers[0].qkv.in;
    const Tokens wanted{in.wanted, in.wanted_count};
    const bool all = wanted.count < 0;
    if (const char* wrong = check(wanted, in.kinds[0].step)) return wrong;
    auto* x = (bf16*)scratch(Scratch::decoder, 2 * rows * size * sizeof(bf16));
    bf16* residual = x + rows * size;
    for (isize i = 0; i < d.count; i++) {
        LayerInput step = in.kinds[d.kinds[i]];
        step.x = i ? x : in.x, step.residual = i ? residual : nullptr, step.out = x, step.sum = residual;
        step.step.cache = (char*)in.cache + i * in.cache_stride;
        run_layer(d.layers[i], step, all || i + 1 < d.count ? nullptr : &wanted);
    }
    norm(DType::bf16, {x, residual, d.norm, in.out, residual, all ? rows : wanted.count, size, size, size, d.eps});
    return nullptr;
}

}  // namespace octavo::OCTAVO_ISA
