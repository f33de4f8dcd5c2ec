// Attention of one query whose heads are few rows (decode), where packing keys and values would cost more than it saves.
#pragma once

#include "attention_block.h"

namespace octavo::OCTAVO_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHasFew = true;
constexpr isize kFewRows = 8;

// Keys are transposed only within 128-bit lanes: vector c of tokens 4 q … 4 q + 3 then has word 4 L + c of each of them
// in lane L, the query is spread the same way (`spread`, [rows][words][16]), and the lanes are added up at the end.
OCTAVO_INLINE void spread_query(const bf16* query, uint32_t* spread, isize words) {
    for (isize w = 0; w < words; w += 16) {
        __m512i q = _mm512_loadu_si512((const uint32_t*)query + w);
        _mm512_store_si512(spread + w * 16, _mm512_shuffle_epi32(q, _MM_PERM_AAAA));
        _mm512_store_si512(spread + w * 16 + 16, _mm512_shuffle_epi32(q, _MM_PERM_BBBB));
        _mm512_store_si512(spread + w * 16 + 32, _mm512_shuffle_epi32(q, _MM_PERM_CCCC));
        _mm512_store_si512(spread + w * 16 + 48, _mm512_shuffle_epi32(q, _MM_PERM_DDDD));
    }
}

// scores[r][0 … 15] of 16 tokens. `spread` rows are 64 words a step of 16 words of the head; `stride` words a row. ASK:
// asks for the rows of `later`, a few lines at a time: many at once would hold up what is computed meanwhile.
template <int ROWS, bool ASK>
OCTAVO_INLINE void score_few(const bf16* const* keys, const bf16* const* later, const uint32_t* spread, isize stride,
                             isize words, float (*scores)[kKeys]) {
    __m512 acc[ROWS][4] = {};
    for (isize w = 0; w < words; w += 16) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            __m512i k[4], t[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                if constexpr (ASK) __builtin_prefetch((const uint32_t*)later[4 * q + i] + w, 0, 2);
                k[i] = _mm512_loadu_si512((const uint32_t*)keys[4 * q + i] + w);
            }
            t[0] = _mm512_unpacklo_epi32(k[0], k[1]), t[1] = _mm512_unpackhi_epi32(k[0], k[1]);
            t[2] = _mm512_unpacklo_epi32(k[2], k[3]), t[3] = _mm512_unpackhi_epi32(k[2], k[3]);
            k[0] = _mm512_unpacklo_epi64(t[0], t[2]), k[1] = _mm512_unpackhi_epi64(t[0], t[2]);
            k[2] = _mm512_unpacklo_epi64(t[1], t[3]), k[3] = _mm512_unpackhi_epi64(t[1], t[3]);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    acc[r][q] = _mm512_dpbf16_ps(
                        acc[r][q], (__m512bh)k[c],
                        (__m512bh)_mm512_load_si512(spread + r * stride + w * 16 + c * 16));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        __m512 s01 = _mm512_shuffle_f32x4(acc[r][0], acc[r][1], 0x44) + _mm512_shuffle_f32x4(acc[r][0], acc[r][1], 0xee);
        __m512 s23 = _mm512_shuffle_f32x4(acc[r][2], acc[r][3], 0x44) + _mm512_shuffle_f32x4(acc[r][2], acc[r][3], 0xee);
        store(scores[r], (vf)(_mm512_shuffle_f32x4(s01, s23, 0x88) + _mm512_shuffle_f32x4(s01, s23, 0xdd)));
    }
}

// out = out * shrink + weights * values, for 32 dimensions of ROWS rows. Within the 32 floats of out the order is that
// of unpacking two rows of V: `restore` puts it right.
template <int ROWS, bool ASK>
OCTAVO_INLINE void mix_few(const bf16* const* values, const bf16* const* later, const bf16 (*weights)[kKeys],
                           const float* shrink, isize pairs, isize first, isize dim, float* out) {
    __m512 acc[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++)
            acc[r][h] = _mm512_loadu_ps(out + r * dim + first + h * 16) * _mm512_set1_ps(shrink[r]);
    for (isize p = 0; p < pairs; p++) {
        if constexpr (ASK) {
            __builtin_prefetch(later[2 * p] + first, 0, 2);
            __builtin_prefetch(later[2 * p + 1] + first, 0, 2);
        }
        __m512i even = _mm512_loadu_si512(values[2 * p] + first), odd = _mm512_loadu_si512(values[2 * p + 1] + first);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int pair;
            std::memcpy(&pair, &weights[r][2 * p], 4);
            __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, weight);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, weight);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(out + r * dim + first + h * 16, acc[r][h]);
}

// From (0-3, 8-11, 16-19, 24-27), (4-7, 12-15, 20-23, 28-31) to the plain order.
OCTAVO_INLINE void restore(float* out) {
    __m512 low = _mm512_loadu_ps(out), high = _mm512_loadu_ps(out + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, second, high));
}

OCTAVO_INLINE void score_rows(const bf16* const* keys, const bf16* const* later, const uint32_t* spread, isize words,
                              isize rows, float (*scores)[kKeys]) {
    with_rows(int(min_of(4, rows)), [&](auto n) {
        if constexpr (decltype(n)::value <= 4)
            score_few<decltype(n)::value, true>(keys, later, spread, words * 16, words, scores);
    });
    if (rows <= 4) return;
    with_rows(int(rows - 4), [&](auto n) {
        if constexpr (decltype(n)::value <= 4)
            score_few<decltype(n)::value, false>(keys, later, spread + 4 * words * 16, words * 16, words, scores + 4);
    });
}

OCTAVO_INLINE void mix_rows(const bf16* const* values, const bf16* const* later, const bf16 (*weights)[kKeys],
                            const float* shrink, isize pairs, isize rows, isize first, isize dim, float* out) {
    with_rows(int(min_of(6, rows)), [&](auto n) {
        mix_few<decltype(n)::value, true>(values, later, weights, shrink, pairs, first, dim, out);
    });
    if (rows <= 6) return;
    with_rows(int(rows - 6), [&](auto n) {
        mix_few<decltype(n)::value, false>(values, later, weights + 6, shrink + 6, pairs, first, dim, out + 6 * dim);
    });
}

// The `width` tokens that come kKeys after `key`: of the item, and behind its end those of the item that comes `then`,
// so that none waits for its first keys.
inline void look_ahead(const AttentionArgs& a, const Sequence& s, const Item& item, const Item* then, isize key,
                       isize width, Block<bf16>& later) {
    const isize first = key + kKeys, own = min_of(width, max_of(0, item.last_key - first));
    later.place(a, s, item.kv_head, first, 0, own);
    isize found = own;
    if (then && own < width) {
        const isize start = then->first_key + max_of(0, first - item.last_key);
        found += min_of(width - own, max_of(0, then->last_key - start));
        later.place(a, sequence_of(a, then->sequence), then->kv_head, start, own, found);
    }
    later.pad(found, width);
}

inline void attend_few(const AttentionArgs& a, const Sequence& s, const Item& item, const Item* then, isize rows,
                       isize position, Work<bf16>& w) {
    alignas(64) float scores[kFewRows][kKeys];
    alignas(64) bf16 weights[kFewRows][kKeys];
    alignas(64) uint32_t spread[kFewRows * kMaxDim / 2 * 16];
    alignas(64) float shrink[kSoftRows];
    Row own[kFewRows];
    const isize words = a.dim / 2;
    for (isize r = 0; r < rows; r++) spread_query(w.query + r * a.dim, spread + r * words * 16, words);
    Block<bf16> now, later;
    for (isize key = item.first_key; key < item.last_key; key += kKeys) {
        const isize count = min_of(kKeys, item.last_key - key), width = (count + kPanel - 1) / kPanel * kPanel;
        now.find(a, s, item.kv_head, key, count);
        look_ahead(a, s, item, then, key, width, later);
        for (isize i = 0; i < width; i += kPanel)
            score_rows(now.keys + i, later.keys + i, spread, words, rows, (float(*)[kKeys])(scores[0] + i));
        const isize low = a.window ? max_of(0, position - a.window + 1 - key) : 0;
        for (isize r = 0; r < rows; r++)
            own[r] = {scores[r], low, min_of(width, position + 1 - key), w.top + r, w.total + r};
        soften(a, own, rows, width, weights, shrink);
        for (isize first = 0; first < a.dim; first += 32)
            mix_rows(now.values, later.values, weights, shrink, width / 2, rows, first, a.dim, w.out);
    }
    for (isize i = 0; i < rows * a.dim; i += 32) restore(w.out + i);
}
#else
constexpr bool kHasFew = false;
constexpr isize kFewRows = 0;
template <class T>
void attend_few(const AttentionArgs&, const Sequence&, const Item&, const Item*, isize, isize, Work<T>&) {}
#endif

}  // namespace octavo::OCTAVO_ISA
