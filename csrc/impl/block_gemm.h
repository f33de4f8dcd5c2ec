// Products with weights in blocks (see blocks.h). Activations become integers, each group by its own greatest value, and
// groups are added up in integers; y = sum over groups of a * d * (q . x) + a * m * sum(x), a being the scale of x.
//
// One int8 for an activation would lose more than bfloat16 does (a small model's answers change), so a row becomes two:
// x = a * 254 * high + a * low. They go through the product as rows of their own and are added at its end.
// A row's result does not depend on how many rows there are: every form adds the same terms in the same order.
//
// With activations in bf16 and many rows, that twofold work costs more than making the weights bf16 for each block of
// rows and multiplying as gemm.h does; which rounding a row gets then depends on the number of rows.
#pragma once

#include "../blocks.h"
#include "dot8.h"
#include "gemm.h"

namespace octavo::OCTAVO_ISA {

// Activations in int8: q [2 rows, in], the high part of a row and then the low one, and for each of these and each group
// a and the rest's factor, which is a * sum(q) where the weight stores a minimum, else -zero * a * sum(q).
struct Quantised {
    const int8_t* q;
    const float* scales;
    isize in, groups;
};

OCTAVO_INLINE vf absolute(vf v) { return (vf)((vu)v & 0x7fffffff); }

constexpr int kBase = 254;  // high and low parts are in -127 ... 127

OCTAVO_INLINE vi rounded(vf v) { return (vi)(v + 12582912.0f) - 0x4b400000; }  // the integer is then in the low bits

OCTAVO_INLINE void store_bytes(int8_t* to, vi v) {
    typedef int8_t vb __attribute__((vector_size(kLanes)));
    const vb bytes = __builtin_convertvector(v, vb);
    std::memcpy(to, &bytes, sizeof bytes);
}

template <class T, int GROUP>
OCTAVO_INLINE void quantise_group(const T* x, float zero, int8_t* high, int8_t* low, float* of_high, float* of_low) {
    constexpr int kVecs = GROUP / kLanes;
    vf v[kVecs], most{};
    for (int i = 0; i < kVecs; i++) v[i] = load(x + i * kLanes), most = vmax(most, absolute(v[i]));
    float largest = max(most);
    if (largest < 1e-33f) largest = 0;  // or its inverse would be infinite
    const float a = largest / (127 * kBase), inverse = largest > 0 ? 127 * kBase / largest : 0;
    vi highs{}, lows{};
    for (int i = 0; i < kVecs; i++) {
        const vi whole = rounded(v[i] * inverse), h = rounded(__builtin_convertvector(whole, vf) * (1.0f / kBase));
        const vi l = whole - h * kBase;
        highs += h, lows += l;
        store_bytes(high + i * kLanes, h);
        store_bytes(low + i * kLanes, l);
    }
    const float factor = zero != 0 ? -zero * a : a;
    of_high[0] = a * kBase, of_high[1] = factor * kBase * sum(__builtin_convertvector(highs, vf));
    of_low[0] = a, of_low[1] = factor * sum(__builtin_convertvector(lows, vf));
}

template <class T>
Quantised quantise(const void* x, isize rows, isize in, isize stride, const BlockShape& shape) {
    const isize groups = in / shape.group, bytes = (2 * rows * in + 63) / 64 * 64;
    auto* q = (int8_t*)scratch(Scratch::quantised, bytes + 2 * rows * groups * 2 * sizeof(float));
    auto* scales = (float*)(q + bytes);
    parallel(rows > 1 && rows * in >= kParallelFrom, rows, [&](isize r) {
        const T* row = (const T*)x + r * stride;
        for (isize g = 0; g < groups; g++) {
            const isize at = g * shape.group;
            int8_t *high = q + 2 * r * in + at, *low = high + in;
            float *of_high = scales + (2 * r * groups + g) * 2, *of_low = of_high + 2 * groups;
            if (shape.group == 16) quantise_group<T, 16>(row + at, shape.zero, high, low, of_high, of_low);
            else quantise_group<T, 32>(row + at, shape.zero, high, low, of_high, of_low);
        }
    });
    return {q, scales, in, groups};
}

OCTAVO_INLINE vf load_half(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vh half;
    std::memcpy(&half, p, sizeof half);
    vu bits = __builtin_convertvector(half, vu);
    vf size = (vf)((bits & 0x7fff) << 13) * 0x1p112f;  // see half_to_float
    return (vf)((vu)size | (bits & 0x8000) << 16);
#endif
}

// Reads a record of a packed weight.
template <Format F>
struct Packed {
    static constexpr BlockShape kShape = block_shape(F);
    static constexpr isize kBytes = record_bytes(kShape);

    OCTAVO_DOT static vf scale(const uint8_t* r, int v) { return load_half(r + v * kLanes * 2); }
    OCTAVO_DOT static vf minimum(const uint8_t* r, int v) { return load_half(r + 32 + v * kLanes * 2); }
    OCTAVO_DOT static vu quad(const uint8_t* r, int i, int v) {
        const uint8_t* line = r + lines_at(kShape) + v * kLanes * 4;
        if constexpr (kShape.bits == 8) return load_u32(line + i * 64);
        vu low = load_u32(line + i / 2 * 64);
        low = (i % 2 ? low >> 4 : low) & 0x0f0f0f0f;
        if constexpr (kShape.bits == 4) return low;
        constexpr int kBits = kShape.bits - 4;
        const vu rest = load_u32(r + rest_at(kShape) + v * kLanes * 4);
        const int shift = 4 - i * kBits;
        return low | ((shift >= 0 ? rest << shift : rest >> -shift) & (kBits == 1 ? 0x10101010u : 0x30303030u));
    }
};

// The same once unpacked for many rows: 16 d, 16 m (float), then the quads a byte each. F is the plainest of the formats
// that are alike then.
template <Format F>
struct Unpacked {
    static constexpr BlockShape kShape = block_shape(F);
    static constexpr isize kBytes = 128 + kShape.group * 16;

    OCTAVO_DOT static vf scale(const uint8_t* r, int v) { return load((const float*)r + v * kLanes); }
    OCTAVO_DOT static vf minimum(const uint8_t* r, int v) { return load((const float*)r + 16 + v * kLanes); }
    OCTAVO_DOT static vu quad(const uint8_t* r, int i, int v) { return load_u32(r + 128 + i * 64 + v * kLanes * 4); }
};

// `groups` records of format F -> as Unpacked reads them.
template <Format F>
void unpack(const uint8_t* from, isize groups, uint8_t* to) {
    using R = Packed<F>;
    for (; groups; groups--, from += R::kBytes, to += 128 + R::kShape.group * 16)
        for (int v = 0; v < kPanelVecs; v++) {
            store((float*)to + v * kLanes, R::scale(from, v));
            if constexpr (R::kShape.minimum) store((float*)to + 16 + v * kLanes, R::minimum(from, v));
#pragma GCC unroll 8
            for (int i = 0; i < R::kShape.group / 4; i++) {
                const vu w = R::quad(from, i, v);
                std::memcpy(to + 128 + i * 64 + v * kLanes * 4, &w, sizeof w);
            }
        }
}

// `groups` records of format F -> bf16 as a panel of gemm.h has them: lines of 16 outputs x 2 inputs.
template <Format F>
void widen_panel(const uint8_t* from, isize groups, bf16* to) {
    using R = Packed<F>;
    for (; groups; groups--, from += R::kBytes, to += R::kShape.group * kPanel)
        for (int v = 0; v < kPanelVecs; v++) {
            const vf d = R::scale(from, v);
            vf m = d * -R::kShape.zero;
            if constexpr (R::kShape.minimum) m = R::minimum(from, v);
#pragma GCC unroll 8
            for (int i = 0; i < R::kShape.group / 4; i++) {
                const vu quad = R::quad(from, i, v);
                for (int pair = 0; pair < 2; pair++) {
                    const vf even = __builtin_convertvector((vi)(quad >> (16 * pair) & 0xff), vf) * d + m;
                    const vf odd = __builtin_convertvector((vi)(quad >> (16 * pair + 8) & 0xff), vf) * d + m;
                    const vu both = __builtin_convertvector(to_bf16(even), vu) |
                                    __builtin_convertvector(to_bf16(odd), vu) << 16;
                    std::memcpy(to + (2 * i + pair) * kLine<bf16> + v * kLanes * 2, &both, sizeof both);
                }
            }
        }
}

// Of ROWS rows from `row` on, groups from … to, with PANELS panels, `stride` bytes apart; AHEAD: asks for the records
// that many bytes further.
template <class R, int ROWS, int PANELS, isize AHEAD = 0>
OCTAVO_INLINE void add_groups(const Quantised& x, isize row, isize from, isize to, const uint8_t* w, isize stride,
                              vf (&acc)[ROWS][PANELS * kPanelVecs]) {
    constexpr int kVecs = PANELS * kPanelVecs;
    const int8_t* q = x.q + row * x.in;
    const float* scales = x.scales + row * x.groups * 2;
    for (isize g = from; g < to; g++, w += R::kBytes) {
        if constexpr (AHEAD > 0)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 12
                for (isize line = 0; line < R::kBytes; line += 64) __builtin_prefetch(w + p * stride + AHEAD + line, 0, 2);
        vi sums[ROWS][kVecs] = {};
#pragma GCC unroll 8
        for (int i = 0; i < R::kShape.group / 4; i++)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
                for (int v = 0; v < kPanelVecs; v++) {
                    const vu quad = R::quad(w + p * stride, i, v);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        const vi four = splat_quad(q + r * x.in + g * R::kShape.group + i * 4);
                        vi& sum = sums[r][p * kPanelVecs + v];
                        sum = dot8<R::kShape.bits>(sum, quad, four);
                    }
                }
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVecs; v++) {
                const vf d = R::scale(w + p * stride, v);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const float a = scales[(r * x.groups + g) * 2], rest = scales[(r * x.groups + g) * 2 + 1];
                    const int n = p * kPanelVecs + v;
                    vf dot = __builtin_convertvector(sums[r][n], vf) * a;
                    if constexpr (R::kShape.minimum) acc[r][n] += R::minimum(w + p * stride, v) * rest;
                    else dot += rest;
                    acc[r][n] += dot * d;
                }
            }
    }
}

// One part of a product.
struct BlockProduct {
    DType type;
    Quantised x;
    const uint8_t* panels;
    isize record, rows, out;  // bytes of a record; rows of x, two for each of the result
    const void* bias;         // of the part's first output; may be null
    void* to;
    isize to_stride;
    void (*unpack)(const uint8_t*, isize, uint8_t*);
};

template <class T, int PANELS>
OCTAVO_INLINE void finish_as(const BlockProduct& b, isize row, isize column, const vf* acc) {
    const T* bias = b.bias ? (const T*)b.bias + column : nullptr;
    finish_row<T, PANELS>(acc, bias, (T*)b.to + row * b.to_stride + column, b.out - column);
}
// Of the high part's row and the low part's after it.
template <int PANELS>
void finish_blocks(const BlockProduct& b, isize high, isize column, vf* acc, const vf* low) {
    for (int v = 0; v < PANELS * kPanelVecs; v++) acc[v] += low[v];
    const isize row = high / 2;
    if (b.type == DType::f32) finish_as<float, PANELS>(b, row, column, acc);
    else finish_as<bf16, PANELS>(b, row, column, acc);
}

constexpr isize kBlocksAhead = 6144;  // bytes
constexpr isize kBlockFew = 4;        // rows; more are faster unpacked

// Few rows: straight from the packed records, one panel after the other, so that memory is read in order; one row of the
// result at a time, from the second on from the cache.
template <Format F>
void stream_blocks(const BlockProduct& b, isize panel) {
    using R = Packed<F>;
    const isize groups = b.x.groups, stride = groups * R::kBytes;
    const uint8_t* w = b.panels + panel * stride;
    for (isize row = 0; row < b.rows; row += 2) {
        vf acc[2][kPanelVecs] = {};
        add_groups<R, 2, 1, kBlocksAhead>(b.x, row, 0, groups, w, stride, acc);
        finish_blocks<1>(b, row, panel * kPanel, acc[0], acc[1]);
    }
}

#if defined(__AVX512F__)
constexpr int kBlockTileRows = 6, kBlockTilePanels = 2;
#else
constexpr int kBlockTileRows = 2, kBlockTilePanels = 1;
#endif
constexpr isize kBlockGroups = 64;  // x 2 x 640 bytes: what is unpacked stays in the second-level cache
// Many rows: the panels are unpacked once for up to kBlockRows of them.
template <Format F, int PANELS>
void block_unit(const BlockProduct& b, Unit unit) {
    using R = Unpacked<F>;
    constexpr int kVecs = PANELS * kPanelVecs;
    constexpr isize kStride = kBlockGroups * R::kBytes, kPartial = kBlockRows * kVecs * kLanes * 4;
    const isize groups = b.x.groups, panel = groups * b.record;
    auto* partial = (float*)scratch(Scratch::tile, kPartial + PANELS * kStride);
    auto* unpacked = (uint8_t*)partial + kPartial;
    for (isize from = 0; from < groups; from += kBlockGroups) {
        const isize count = groups - from < kBlockGroups ? groups - from : kBlockGroups;
        for (isize p = 0; p < PANELS; p++)
            b.unpack(b.panels + (unit.first_panel + p) * panel + from * b.record, count, unpacked + p * kStride);
        for (isize r = 0; r < unit.rows; r += kBlockTileRows)
            with_rows(int(unit.rows - r < kBlockTileRows ? unit.rows - r : kBlockTileRows), [&](auto height) {
                constexpr int ROWS = decltype(height)::value;
                if constexpr (ROWS <= kBlockTileRows) {
                    vf acc[ROWS][kVecs] = {};
                    float* sums = partial + r * kVecs * kLanes;
                    if (from)
                        for (int i = 0; i < ROWS * kVecs; i++) acc[i / kVecs][i % kVecs] = load(sums + i * kLanes);
                    add_groups<R, ROWS, PANELS>(b.x, unit.first_row + r, from, from + count, unpacked, kStride, acc);
                    for (int i = 0; i < ROWS && from + count < groups; i++)
                        for (int v = 0; v < kVecs; v++) store(sums + (i * kVecs + v) * kLanes, acc[i][v]);
                    for (int i = 0; i + 1 < ROWS && from + count == groups; i += 2)
                        finish_blocks<PANELS>(b, unit.first_row + r + i, unit.first_panel * kPanel, acc[i], acc[i + 1]);
                }
            });
    }
}

// F: of the records. PLAIN: what they are alike to once unpacked.
template <Format F, Format PLAIN>
void block_part(BlockProduct b) {
    const isize panels = (b.out + kPanel - 1) / kPanel;
    b.record = Packed<F>::kBytes, b.unpack = unpack<F>;
    if (b.rows > 2 * kBlockFew) {
        each_unit<kBlockTilePanels>(panels, b.rows, [&](Unit unit, auto count) {
            block_unit<PLAIN, decltype(count)::value>(b, unit);
        });
        return;
    }
    parallel(true, panels, [&](isize panel) { stream_blocks<F>(b, panel); });
}

// The product of x, in bf16, with a part whose panels are widened for each unit of work.
template <Format F>
void widened_part(const Weight& w, const ProductArgs& a, const Part& part, const bf16* bias, bf16* to) {
    const isize groups = w.in / block_shape(F).group, record = Packed<F>::kBytes, stride = w.in * kPanel;
    const LinearArgs args{(const bf16*)a.x, nullptr, bias, to, a.rows, w.in, part.out, a.x_stride, w.out};
    each_unit<kUnitPanels>((part.out + kPanel - 1) / kPanel, a.rows, [&](Unit unit, auto count) {
        constexpr int PANELS = decltype(count)::value;
        auto* wide = (bf16*)scratch(Scratch::weights, PANELS * stride * sizeof(bf16));
        for (isize p = 0; p < PANELS; p++)
            widen_panel<F>((const uint8_t*)part.panels + (unit.first_panel + p) * groups * record, groups, wide + p * stride);
        run_unit<PANELS>(args, unit, wide);
    });
}

inline Quantised quantise(DType type, const Weight& w, const ProductArgs& a, const BlockShape& shape) {
    if (type == DType::f32) return quantise<float>(a.x, a.rows, w.in, a.x_stride, shape);
    return quantise<bf16>(a.x, a.rows, w.in, a.x_stride, shape);
}

template <class F>
void with_format(Format format, F&& f) {
    switch (format) {
        case Format::q4: f(std::integral_constant<Format, Format::q4>{}); break;
        case Format::q4m: f(std::integral_constant<Format, Format::q4m>{}); break;
        case Format::q5: f(std::integral_constant<Format, Format::q5>{}); break;
        case Format::q5m: f(std::integral_constant<Format, Format::q5m>{}); break;
        case Format::q6: f(std::integral_constant<Format, Format::q6>{}); break;
        default: f(std::integral_constant<Format, Format::q8>{});
    }
}

// What a format is alike to once unpacked.
constexpr Format plain(Format f) { return f == Format::q5 ? Format::q4 : f == Format::q5m ? Format::q4m : f; }

inline void block_product(DType type, const Weight& w, const ProductArgs& a) {
    const isize size = type == DType::f32 ? 4 : 2;
    const bool widens = type == DType::bf16 && a.rows > kBlockFew;
    Quantised x{};
    BlockShape made{};
    isize first = 0;
    for (int i = 0; i < w.count; first += w.parts[i++].out) {
        const Part& part = w.parts[i];
        if (widens) {
            auto* bias = w.bias ? (const bf16*)w.bias + first : nullptr;
            with_format(part.format, [&](auto format) {
                widened_part<decltype(format)::value>(w, a, part, bias, (bf16*)a.out + first);
            });
            continue;
        }
        const BlockShape shape = block_shape(part.format);
        if (shape.group != made.group || shape.zero != made.zero) x = quantise(type, w, a, shape), made = shape;
        const void* bias = w.bias ? (const char*)w.bias + first * size : nullptr;
        const BlockProduct b{type, x, (const uint8_t*)part.panels, 0, 2 * a.rows, part.out, bias,
                             (char*)a.out + first * size, w.out, nullptr};
        with_format(part.format, [&](auto format) {
            constexpr Format F = decltype(format)::value;
            block_part<F, plain(F)>(b);
        });
    }
}

}  // namespace octavo::OCTAVO_ISA
