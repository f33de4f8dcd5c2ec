// What all forms of attention share: the plan of work items, blocks of keys, and the online softmax of a row.
#pragma once

#include "gemm.h"

namespace octavo::OCTAVO_ISA {

constexpr isize kKeys = 128;        // tokens of a block
constexpr isize kSplit = 512;       // tokens of a split, where a sequence has one block of queries
constexpr isize kQueryRows = 96;    // rows of an item, twice as many where threads get enough items all the same:
constexpr isize kEnoughItems = 8;   // for each; all rows of an item share the packing of its keys
constexpr isize kMaxDim = 256;

struct Item {
    isize sequence, kv_head, first_query, queries;  // query counted from the sequence's first in this step
    isize first_key, last_key;
    isize partial;  // where its unfinished result goes, in floats; -1: it is the only item of its rows
    isize parts;    // of the first item of a split: how many items; else 0
};

// What all items of a sequence share.
struct Sequence {
    isize start, queries, length;
    const int32_t* pages;
};

OCTAVO_INLINE Sequence sequence_of(const AttentionArgs& a, isize b) {
    return {a.query_start[b], a.query_start[b + 1] - a.query_start[b], a.seq_lens[b],
            a.block_table + a.rows[b] * a.table_width};
}

inline const char* check(const AttentionArgs& a) {
    for (isize b = 0; b < a.items; b++) {
        if (a.rows[b] < 0 || a.rows[b] >= a.table_rows) return "a row is outside of the block table";
        Sequence s = sequence_of(a, b);
        if (s.start < 0 || s.queries < 0 || s.start + s.queries > a.tokens) return "query_start is outside of the query";
        if (s.length < s.queries || s.length > a.table_width * a.page_size) return "a sequence exceeds its pages";
        for (isize p = 0; p < (s.length + a.page_size - 1) / a.page_size; p++)
            if (s.pages[p] < 0 || s.pages[p] >= a.pages) return "a page is outside of the KV cache";
    }
    return nullptr;
}

inline isize min_of(isize a, isize b) { return a < b ? a : b; }
inline isize max_of(isize a, isize b) { return a > b ? a : b; }

struct Plan {
    isize items, partial_floats;
};

// Fills items (null: only counts). Long blocks of a sequence come first, so that threads end together.
inline Plan plan(const AttentionArgs& a, Item* items) {
    const bool many = a.tokens * a.heads >= 2 * kQueryRows * kEnoughItems * threads();
    const isize group = a.heads / a.kv_heads, block = max_of(1, (many ? 2 : 1) * kQueryRows / group);
    Plan p{0, 0};
    for (isize b = 0; b < a.items; b++) {
        Sequence s = sequence_of(a, b);
        const isize blocks = (s.queries + block - 1) / block;
        for (isize q = blocks - 1; q >= 0; q--) {
            const isize first = q * block, count = min_of(block, s.queries - first);
            const isize seen = s.length - s.queries + first;  // position of the block's first query
            const isize from = a.window ? max_of(0, seen - a.window + 1) / kKeys * kKeys : 0, to = seen + count;
            const isize split = blocks > 1 ? to : kSplit, base = from / split * split;
            const isize parts = (to - base + split - 1) / split;
            for (isize h = 0; h < a.kv_heads; h++)
                for (isize i = 0; i < parts; i++, p.items++) {
                    isize partial = -1;
                    if (parts > 1) partial = p.partial_floats, p.partial_floats += count * group * (a.dim + 2);
                    if (!items) continue;
                    items[p.items] = {b, h, first, count, max_of(from, base + i * split),
                                      min_of(to, base + (i + 1) * split), partial, i ? 0 : parts};
                }
        }
    }
    return p;
}

// Row-major words of 16 tokens -> [words][16].
OCTAVO_INLINE void transpose(const uint32_t* const* rows, uint32_t* out, isize words) {
    isize w = 0;
#if defined(__AVX512F__)
    for (; w + 16 <= words; w += 16) {
        __m512i r[16], t[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + w);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // r[4 q + c] holds columns c, 4 + c, 8 + c, 12 + c of tokens 4 q … 4 q + 3, one column a 128-bit lane.
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
            __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
            _mm512_storeu_si512(out + (w + c) * 16, _mm512_shuffle_i32x4(a, b, 0x88));
            _mm512_storeu_si512(out + (w + 8 + c) * 16, _mm512_shuffle_i32x4(a, b, 0xdd));
            _mm512_storeu_si512(out + (w + 4 + c) * 16, _mm512_shuffle_i32x4(d, e, 0x88));
            _mm512_storeu_si512(out + (w + 12 + c) * 16, _mm512_shuffle_i32x4(d, e, 0xdd));
        }
    }
#endif
    for (; w < words; w++)
        for (int i = 0; i < 16; i++) out[w * 16 + i] = rows[i][w];
}

// V of `steps` steps of tokens -> panels of 16 dimensions, each [kKeys / kStep][16][kStep].
template <class T>
OCTAVO_INLINE void pack_values(const T* const* rows, T* out, isize steps, isize dim) {
    for (isize d = 0; d < dim; d += kLanes) {
        T* panel = out + d / kPanel * kKeys * kPanel + d % kPanel * kStep<T>;
        for (isize k = 0; k < steps; k++) {
            if constexpr (sizeof(T) == 4) {
                store(panel + k * kLine<T>, load(rows[k] + d));
            } else {
                vh even, odd;
                std::memcpy(&even, rows[2 * k] + d, sizeof even);
                std::memcpy(&odd, rows[2 * k + 1] + d, sizeof odd);
                vu pairs = __builtin_convertvector(even, vu) | __builtin_convertvector(odd, vu) << 16;
                std::memcpy(panel + k * kLine<T>, &pairs, sizeof pairs);
            }
        }
    }
}

// The buffers of one item; all 64-byte aligned.
template <class T>
struct Work {
    T *query, *keys, *values;
    float *out, *top, *total;  // [rows, dim], [rows], [rows]: sum of weights times V, largest score, sum of weights

    Work(isize rows, isize dim) {
        auto up = [](isize n) { return (n + 63) / 64 * 64; };
        const isize pack = kKeys * dim * isize(sizeof(T)), row = up(rows * 4);
        char* p = (char*)scratch(Scratch::tile, up(rows * dim * sizeof(T)) + 2 * pack + up(rows * dim * 4) + 2 * row);
        keys = (T*)p, values = (T*)(p + pack), out = (float*)(p + 2 * pack);
        top = (float*)((char*)out + up(rows * dim * 4)), total = (float*)((char*)top + row);
        query = (T*)((char*)total + row);
    }
};

// Where the keys and values of up to kKeys tokens lie; filled up with zeros to a whole panel.
template <class T>
struct Block {
    const T *keys[kKeys], *values[kKeys];

    void find(const AttentionArgs& a, const Sequence& s, isize kv_head, isize first, isize count) {
        place(a, s, kv_head, first, 0, count);
        pad(count, (count + kPanel - 1) / kPanel * kPanel);
    }

    // Tokens from `first` on of a sequence become those from `from` to `to` of the block.
    void place(const AttentionArgs& a, const Sequence& s, isize kv_head, isize first, isize from, isize to) {
        const isize head = a.page_size * a.dim;
        isize page = first / a.page_size, offset = first % a.page_size;
        for (isize i = from; i < to; page++, offset = 0) {
            const T* key = (const T*)a.cache + (isize(s.pages[page]) * 2 * a.kv_heads + kv_head) * head;
            for (; i < to && offset < a.page_size; i++, offset++) {
                keys[i] = key + offset * a.dim;
                values[i] = keys[i] + a.kv_heads * head;
            }
        }
    }

    void pad(isize from, isize to) {
        alignas(64) static const T zeros[kMaxDim] = {};
        for (isize i = from; i < to; i++) keys[i] = values[i] = zeros;
    }
};

template <class T>
OCTAVO_INLINE void pack_block(const Block<T>& block, isize count, isize dim, Work<T>& w) {
    const isize padded = (count + kPanel - 1) / kPanel * kPanel, words = dim * isize(sizeof(T)) / 4;
    for (isize i = 0; i < padded; i += kPanel)
        transpose((const uint32_t* const*)block.keys + i, (uint32_t*)w.keys + i * words, words);
    pack_values(block.values, w.values, padded / kStep<T>, dim);
}

constexpr int kSoftRows = 16;  // most rows of `soften`

// A row's scores of a block and what is known of the blocks before.
struct Row {
    float* scores;
    isize low, high;  // keys from low to high are seen
    float *top, *total;
};

// The largest score of a row, scaled and capped. `factor`: what makes them so that are stored; 1 if they are already.
OCTAVO_INLINE float largest(const AttentionArgs& a, const Row& row, isize width, float& factor) {
    vf best = splat(-INFINITY);
    if (a.softcap == 0 && a.scale > 0 && row.low <= 0 && row.high >= width) {
        for (isize i = 0; i < width; i += kLanes) best = vmax(load(row.scores + i), best);
        factor = a.scale;
        return max(best) * a.scale;
    }
    for (isize i = 0; i < width; i += kLanes) {
        vf v = load(row.scores + i) * a.scale;
        if (a.softcap != 0) v = a.softcap * vtanh(v / a.softcap);
        if (i < row.low || i + kLanes > row.high) {
            vi at;
            for (int lane = 0; lane < kLanes; lane++) at[lane] = int32_t(i) + lane;
            v = select((at >= int32_t(row.low)) & (at < int32_t(row.high)), v, splat(-INFINITY));
        }
        store(row.scores + i, v);
        best = vmax(v, best);
    }
    factor = 1.0f;
    return max(best);
}

// Scores of up to kSoftRows rows -> weights in T; shrink [kSoftRows]: by how much what was gathered so far must shrink.
template <class T>
OCTAVO_INLINE void soften(const AttentionArgs& a, const Row* rows, isize count, isize width, T (*weights)[kKeys],
                          float* shrink) {
    // In logarithms to the base 2. Scores are stored as they are: the factor that scales them is part of the exponent's.
    alignas(64) float before[kSoftRows] = {}, base[kSoftRows] = {};
    float factor[kSoftRows];
    for (isize r = 0; r < count; r++) {
        before[r] = *rows[r].top * kLog2e;
        const float here = largest(a, rows[r], width, factor[r]);
        if (here > *rows[r].top) *rows[r].top = here;
        base[r] = *rows[r].top == -INFINITY ? 0.0f : *rows[r].top * kLog2e;  // of a row that has seen nothing yet
        factor[r] *= kLog2e;
    }
    for (isize r = 0; r < count; r += kLanes) store(shrink + r, vexp2(load(before + r) - load(base + r)));
    for (isize r = 0; r < count; r++) {
        vf added{};
        for (isize i = 0; i < width; i += kLanes) {
            const vf v = vexp2(load(rows[r].scores + i) * factor[r] - base[r]);
            added += v;
            store(weights[r] + i, v);
        }
        *rows[r].total = *rows[r].total * shrink[r] + sum(added);
    }
}

}  // namespace octavo::OCTAVO_ISA
