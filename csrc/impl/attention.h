// Causal attention over the paged cache, prefill and decode alike. A work item is (sequence, KV head, block of queries,
// range of keys). All query heads of the KV head are rows of one product: row = query * group + head in group. Keys come
// in blocks of kKeys tokens, packed into panels once for all rows; a tile of rows then goes through scores, online
// softmax and the product with V while everything is in the first-level cache. Blocks and splits start at multiples of
// fixed sizes from position 0, so a sequence's result does not depend on its neighbours in the batch.
#pragma once

#include "attention_few.h"

namespace octavo::OCTAVO_ISA {

// Rows first … first + ROWS of an item against the packed block of keys starting at `key`.
template <class T, int ROWS>
OCTAVO_INLINE void attend_tile(const AttentionArgs& a, Work<T>& w, isize first, isize group, isize position, isize key,
                               isize count) {
    const isize width = (count + kPanel - 1) / kPanel * kPanel, dim = a.dim;
    alignas(64) float scores[ROWS][kKeys];
    alignas(64) T weights[ROWS][kKeys];
    alignas(64) float shrink[kSoftRows];
    Row own[ROWS];
    const T* query = w.query + first * dim;
    for (isize p = 0; p < width / kPanel; p += kTilePanels)
        with_panels(min_of(kTilePanels, width / kPanel - p), [&](auto panels) {
            constexpr int PANELS = decltype(panels)::value;
            vf acc[ROWS][PANELS * kPanelVecs] = {};
            tile<T, ROWS, PANELS>(query, dim, w.keys + p * kPanel * dim, kPanel * dim, dim / kStep<T>, acc);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < PANELS * kPanelVecs; v++) store(&scores[r][p * kPanel + v * kLanes], acc[r][v]);
        });
    for (int r = 0; r < ROWS; r++) {
        const isize at = position + (first + r) / group;  // of the row's query
        const isize low = a.window ? max_of(0, at - a.window + 1 - key) : 0, high = min_of(width, at + 1 - key);
        own[r] = {scores[r], low, high, w.top + first + r, w.total + first + r};
    }
    soften(a, own, ROWS, width, weights, shrink);
    for (isize p = 0; p < dim / kPanel; p += kTilePanels)
        with_panels(min_of(kTilePanels, dim / kPanel - p), [&](auto panels) {
            constexpr int PANELS = decltype(panels)::value;
            constexpr int VECS = PANELS * kPanelVecs;
            vf acc[ROWS][VECS];
            float* out = w.out + first * dim + p * kPanel;
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) acc[r][v] = load(out + r * dim + v * kLanes) * shrink[r];
            tile<T, ROWS, PANELS>(weights[0], kKeys, w.values + p * kPanel * kKeys, kPanel * kKeys, width / kStep<T>,
                                  acc);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) store(out + r * dim + v * kLanes, acc[r][v]);
        });
}

template <class T>
OCTAVO_INLINE T* head_row(void* base, isize stride, isize dim, isize token, isize head) {
    return (T*)base + token * stride + head * dim;
}

template <class T>
OCTAVO_INLINE void write_row(T* out, const float* from, float total, isize dim) {
    const float inverse = 1.0f / total;
    for (isize i = 0; i < dim; i += kLanes) store(out + i, load(from + i) * inverse);
}

// Hands an item's rows over: to the output, or to `join`.
template <class T>
OCTAVO_INLINE void leave(const AttentionArgs& a, const Sequence& s, const Item& item, const Work<T>& w,
                         float* partials) {
    const isize group = a.heads / a.kv_heads, rows = item.queries * group, dim = a.dim;
    for (isize r = 0; r < rows; r++) {
        if (item.partial < 0) {
            const isize token = s.start + item.first_query + r / group, head = item.kv_head * group + r % group;
            write_row(head_row<T>(a.out, a.heads * dim, dim, token, head), w.out + r * dim, w.total[r], dim);
            continue;
        }
        float* partial = partials + item.partial + r * (dim + 2);
        std::memcpy(partial, w.out + r * dim, dim * 4);
        partial[dim] = w.top[r], partial[dim + 1] = w.total[r];
    }
}

// `then`: the item that probably comes next on this thread, or null.
template <class T>
void run_item(const AttentionArgs& a, const Item& item, const Item* then, float* partials) {
    const Sequence s = sequence_of(a, item.sequence);
    const isize group = a.heads / a.kv_heads, rows = item.queries * group, dim = a.dim;
    const isize position = s.length - s.queries + item.first_query;
    Work<T> w(rows, dim);
    auto token_of = [&](isize row) { return s.start + item.first_query + row / group; };
    auto head_of = [&](isize row) { return item.kv_head * group + row % group; };
    for (isize r = 0; r < rows; r++) {
        std::memcpy((void*)(w.query + r * dim),
                    head_row<const T>((void*)a.query, a.query_stride, dim, token_of(r), head_of(r)), dim * sizeof(T));
        const bool sink = a.sinks && item.partial < 0;  // of a split, join adds it
        w.top[r] = sink ? a.sinks[head_of(r)] : -INFINITY;
        w.total[r] = sink ? 1.0f : 0.0f;
    }
    std::memset(w.out, 0, rows * dim * 4);
    if constexpr (kHasFew && sizeof(T) == 2) {
        if (item.queries == 1 && rows <= kFewRows && dim % 32 == 0) {
            attend_few(a, s, item, then, rows, position, w);
            return leave(a, s, item, w, partials);
        }
    }
    Block<T> block;
    for (isize key = item.first_key; key < item.last_key; key += kKeys) {
        const isize count = min_of(kKeys, item.last_key - key);
        block.find(a, s, item.kv_head, key, count);
        pack_block(block, count, dim, w);
        for (isize r = 0; r < rows; r += kTileRows) {
            const isize height = min_of(kTileRows, rows - r);
            const isize oldest = position + r / group, newest = position + (r + height - 1) / group;
            if (newest < key || (a.window && oldest - a.window + 1 >= key + kKeys)) continue;
            with_rows(int(height), [&](auto n) {  // with the keys that the newest row sees
                attend_tile<T, decltype(n)::value>(a, w, r, group, position, key, min_of(count, newest + 1 - key));
            });
        }
    }
    leave(a, s, item, w, partials);
}

// Joins the parts of a split, in order.
template <class T>
void join(const AttentionArgs& a, const Item& item, const float* partials) {
    const Sequence s = sequence_of(a, item.sequence);
    const isize group = a.heads / a.kv_heads, rows = item.queries * group, dim = a.dim;
    for (isize r = 0; r < rows; r++) {
        const isize token = s.start + item.first_query + r / group, head = item.kv_head * group + r % group;
        const float* first = partials + item.partial + r * (dim + 2);
        const isize stride = rows * (dim + 2);
        float top = a.sinks ? a.sinks[head] : -INFINITY;
        for (isize i = 0; i < item.parts; i++) top = first[i * stride + dim] > top ? first[i * stride + dim] : top;
        float total = a.sinks ? std::exp(a.sinks[head] - top) : 0.0f;
        alignas(64) float out[kMaxDim] = {};
        for (isize i = 0; i < item.parts; i++) {
            const float* part = first + i * stride;
            const float shrink = vexp(splat(part[dim] - top))[0];
            total += part[dim + 1] * shrink;
            for (isize d = 0; d < dim; d += kLanes) store(out + d, load(out + d) + load(part + d) * shrink);
        }
        write_row(head_row<T>(a.out, a.heads * dim, dim, token, head), out, total, dim);
    }
}

template <class T>
void attention_of(const AttentionArgs& a) {
    auto* items = (Item*)scratch(Scratch::items, plan(a, nullptr).items * sizeof(Item));
    const Plan p = plan(a, items);
    auto* partials = (float*)scratch(Scratch::partials, p.partial_floats * 4);
    parallel(true, p.items, [&](isize i) {
        run_item<T>(a, items[i], i + 1 < p.items ? items + i + 1 : nullptr, partials);
    });
    parallel(p.partial_floats > 0, p.items, [&](isize i) {
        if (items[i].parts > 1) join<T>(a, items[i], partials);
    });
}

inline const char* attention(DType type, const AttentionArgs& a) {
    if (const char* wrong = check(a)) return wrong;
    type == DType::f32 ? attention_of<float>(a) : attention_of<bf16>(a);
    return nullptr;
}

}  // namespace octavo::OCTAVO_ISA
