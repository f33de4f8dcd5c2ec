// Products with a weight in panels (see kernels.h): a register tile of ROWS inputs by PANELS x 16 outputs, and the loops
// around it. Attention uses the same tile, with K and V of a block of tokens packed into panels.
#pragma once

#include "amx.h"
#include "vec.h"

namespace octavo::OCTAVO_ISA {

// The largest tile that leaves registers for the weights and one input: 24 of 32 with AVX-512, 8 of 16 elsewhere.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTilePanels = 4;
#else
constexpr int kTileRows = 4, kTilePanels = 1;
#endif

// How a panel is read: bf16 in pairs of inputs, float one by one.
template <class T>
constexpr int kStep = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr isize kLine = kPanel* kStep<T>;  // elements of one step of a panel

// acc[lane] += w[lane] . x for one step of one vector of outputs.
template <class T>
struct Dot;

template <>
struct Dot<float> {
    vf x;
    OCTAVO_DOT explicit Dot(const float* p) : x(splat(*p)) {}
    OCTAVO_DOT void add(vf& acc, const float* w) const { acc += load(w) * x; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
    __m512i x;
    OCTAVO_DOT explicit Dot(const bf16* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        x = _mm512_set1_epi32(pair);
    }
    OCTAVO_DOT void add(vf& acc, const bf16* w) const {
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)x);
    }
};
#else
template <>
struct Dot<bf16> {
    vf first, second;
    OCTAVO_DOT explicit Dot(const bf16* p) : first(splat(widen(p[0]))), second(splat(widen(p[1]))) {}
    OCTAVO_DOT void add(vf& acc, const bf16* w) const {
        vu pairs = load_u32(w);
        acc += (vf)(pairs << 16) * first;
        acc += (vf)(pairs & 0xffff0000u) * second;
    }
};
#endif

// acc += x[ROWS, steps] * panels; x rows are x_stride apart, panels panel_stride. Asks for AHEAD panels from `ahead` on.
template <class T, int ROWS, int PANELS, int AHEAD = 0>
OCTAVO_INLINE void tile(const T* x, isize x_stride, const T* w, isize panel_stride, isize steps,
                        vf (&acc)[ROWS][PANELS * kPanelVecs], const T* ahead = nullptr) {
    for (isize k = 0; k < steps; k++) {
#pragma GCC unroll 8
        for (int p = 0; p < AHEAD; p++) __builtin_prefetch(ahead + p * panel_stride + k * kLine<T>, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            Dot<T> dot(x + r * x_stride + k * kStep<T>);
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
                for (int v = 0; v < kPanelVecs; v++)
                    dot.add(acc[r][p * kPanelVecs + v], w + p * panel_stride + k * kLine<T> + v * kLanes * kStep<T>);
        }
    }
}

// Calls f<ROWS> with ROWS = rows, 1 to kTileRows.
template <class F>
OCTAVO_INLINE void with_rows(int rows, F&& f) {
    switch (rows) {
        case 1: f(std::integral_constant<int, 1>{}); break;
        case 2: f(std::integral_constant<int, 2>{}); break;
        case 3: f(std::integral_constant<int, 3>{}); break;
        case 4: f(std::integral_constant<int, 4>{}); break;
#if defined(__AVX512F__)
        case 5: f(std::integral_constant<int, 5>{}); break;
        case 6: f(std::integral_constant<int, 6>{}); break;
#endif
    }
}

// Calls f<PANELS> with PANELS = panels, 1 to MOST.
template <int MOST = kTilePanels, class F>
OCTAVO_INLINE void with_panels(isize panels, F&& f) {
    switch (panels) {
        case 1: f(std::integral_constant<int, 1>{}); break;
        case 2:
            if constexpr (MOST >= 2) f(std::integral_constant<int, 2>{});
            break;
        case 3:
            if constexpr (MOST >= 3) f(std::integral_constant<int, 3>{});
            break;
        case 4:
            if constexpr (MOST >= 4) f(std::integral_constant<int, 4>{});
            break;
    }
}

// Panels of a unit, and how many rows are at most streamed instead (see `stream_panels`): with AMX none (see amx.h).
#if defined(OCTAVO_AMX)
constexpr int kUnitPanels = 4, kStreamRows = 0;
#else
constexpr int kUnitPanels = kTilePanels, kStreamRows = 4;
#endif
constexpr isize kBlockSteps = 1024;  // x 2 x 128 bytes: the weights of a unit stay in the second-level cache
constexpr isize kBlockRows = 240;    // a multiple of every tile height

// One group of up to kUnitPanels panels against up to kBlockRows rows.
struct Unit {
    isize first_row, rows, first_panel;
};

// x [rows, in] bf16 times the panels of `out` outputs, to rows of `to` that are `to_stride` apart.
struct LinearArgs {
    const bf16 *x, *panels, *bias;  // bias may be null
    bf16* to;
    isize rows, in, out, x_stride, to_stride;
};

// A row of PANELS x 16 sums, of which the first `left` are outputs, with their bias added.
template <class T, int PANELS>
OCTAVO_INLINE void finish_row(const vf* acc, const T* bias, T* out, isize left) {
    for (int v = 0; v < PANELS * kPanelVecs; v++, left -= kLanes) {
        if (left >= kLanes) {
            store(out + v * kLanes, bias ? acc[v] + load(bias + v * kLanes) : acc[v]);
            continue;
        }
        for (isize i = 0; i < left; i++)
            out[v * kLanes + i] = narrow<T>(acc[v][i] + (bias ? widen(bias[v * kLanes + i]) : 0.0f));
    }
}

template <int PANELS>
OCTAVO_INLINE void finish(const LinearArgs& a, isize row, isize column, const vf* acc) {
    finish_row<bf16, PANELS>(acc, a.bias ? a.bias + column : nullptr, a.to + row * a.to_stride + column, a.out - column);
}

// Shares out all panels in groups of MOST; what is left after every thread had the same number of groups, evenly, in
// narrow ones. These come last in either half of the loop: threads begin at both (pool.cpp) and should end together.
// f gets a group's first panel and, as a constant, how many it has.
template <int MOST, class F>
OCTAVO_INLINE void each_group(isize panels, F f) {
    const isize workers = threads(), wide = panels / MOST / workers * workers, rest = panels - wide * MOST;
    isize width = (rest + workers - 1) / workers;
    width = width < 1 ? 1 : width > MOST ? MOST : width;
    const isize narrow = (rest + width - 1) / width, count = wide + narrow, half = count / 2;
    const isize ends[2] = {half - narrow / 2, count - (narrow - narrow / 2)};  // of the wide ones in each half
    parallel(true, count, [&](isize u) {
        const isize end = ends[u >= half], before = u < half ? 0 : narrow / 2;  // narrow ones in the first half
        if (u < end) return f((u - before) * MOST, std::integral_constant<int, MOST>{});
        const isize first = wide * MOST + (before + u - end) * width;
        with_panels<MOST>(panels - first < width ? panels - first : width, [&](auto few) { f(first, few); });
    });
}

// Shares out blocks of rows and groups of MOST panels; f gets a unit and, as a constant, how many panels it has.
template <int MOST, class F>
OCTAVO_INLINE void each_unit(isize panels, isize rows, F f) {
    const isize groups = (panels + MOST - 1) / MOST, blocks = (rows + kBlockRows - 1) / kBlockRows;
    if (blocks == 1) return each_group<MOST>(panels, [&](isize panel, auto count) { f(Unit{0, rows, panel}, count); });
    parallel(true, groups * blocks, [&](isize u) {
        const isize first = u / groups * kBlockRows, panel = u % groups * MOST;
        const Unit unit{first, rows - first < kBlockRows ? rows - first : kBlockRows, panel};
        with_panels<MOST>(panels - panel < MOST ? panels - panel : MOST, [&](auto count) { f(unit, count); });
    });
}

// Asks for the lines of `rows` rows of the result, to be written after a tile: a store whose line is not there holds up
// those behind it, and the rows of a long prompt's result are never in a cache.
template <int PANELS>
OCTAVO_INLINE void ask_for_result(const LinearArgs& a, isize row, int rows, isize first_panel) {
    constexpr int kLinePanels = 64 / (kPanel * sizeof(bf16));
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PANELS; p += kLinePanels)
            __builtin_prefetch(a.to + (row + r) * a.to_stride + (first_panel + p) * kPanel, 1);
}

// `weight`: the unit's panels.
#if defined(OCTAVO_AMX)
template <int PANELS>
void run_unit(const LinearArgs& a, Unit unit, const bf16* weight) {
    const AmxUnit u{a.x + unit.first_row * a.x_stride, weight, nullptr, a.x_stride, 0, unit.rows, 0};
    auto ask = [&](isize row, isize rows) {
        ask_for_result<PANELS>(a, unit.first_row + row, int(rows), unit.first_panel);
    };
    amx_unit<PANELS>(u, a.in / 2, ask, [&](isize row, const vf* sums) {
        finish<PANELS>(a, unit.first_row + row, unit.first_panel * kPanel, sums);
    });
}
#else
template <int PANELS>
void run_unit(const LinearArgs& a, Unit unit, const bf16* weight) {
    constexpr int kVecs = PANELS * kPanelVecs;
    const isize steps = a.in / 2, panel_stride = steps * kLine<bf16>;
    const bool blocked = steps > kBlockSteps, spread = unit.rows > (PANELS - 1) * kTileRows;
    auto* partial = blocked ? (float*)scratch(Scratch::tile, kBlockRows * kVecs * kLanes * 4) : nullptr;
    for (isize from = 0; from < steps; from += kBlockSteps) {
        const isize count = steps - from < kBlockSteps ? steps - from : kBlockSteps;
        const bool last = from + count == steps;
        for (isize r = 0; r < unit.rows; r += kTileRows) {
            const bf16* x = a.x + (unit.first_row + r) * a.x_stride + from * 2;
            with_rows(int(unit.rows - r < kTileRows ? unit.rows - r : kTileRows), [&](auto height) {
                constexpr int ROWS = decltype(height)::value;
                vf acc[ROWS][kVecs] = {};
                if (last) ask_for_result<PANELS>(a, unit.first_row + r, ROWS, unit.first_panel);
                if (from)
                    for (int i = 0; i < ROWS * kVecs; i++)
                        acc[i / kVecs][i % kVecs] = load(partial + (r * kVecs + i) * kLanes);
                // The weights of the unit that follows arrive while this one computes, a panel a tile if these are enough:
                // all at once they would take longer than the first tile.
                const bf16 *w = weight + from * kLine<bf16>, *next = w + PANELS * panel_stride;
                const isize place = r / kTileRows;
                if (spread && place < PANELS)
                    tile<bf16, ROWS, PANELS, 1>(x, a.x_stride, w, panel_stride, count, acc, next + place * panel_stride);
                else if (!spread && place == 0)
                    tile<bf16, ROWS, PANELS, PANELS>(x, a.x_stride, w, panel_stride, count, acc, next);
                else tile<bf16, ROWS, PANELS>(x, a.x_stride, w, panel_stride, count, acc);
                for (int i = 0; i < ROWS; i++) {
                    if (last) finish<PANELS>(a, unit.first_row + r + i, unit.first_panel * kPanel, acc[i]);
                    else
                        for (int v = 0; v < kVecs; v++) store(partial + ((r + i) * kVecs + v) * kLanes, acc[i][v]);
                }
            });
        }
    }
}
#endif

// Few rows: memory-bound. A group of panels at once, since several streams fill more of the memory's pipeline than one;
// each is asked for a few KB ahead, past its end in the group that comes next. Sums run over the inputs in order, as in
// the tile, so a row's result does not depend on how many rows there are.
constexpr isize kAhead = 96;  // steps

template <int ROWS, int PANELS>
OCTAVO_INLINE void stream_panels(const LinearArgs& a, isize first) {
    const isize steps = a.in / 2, stride = steps * kLine<bf16>;
    const bf16 *w = a.panels + first * stride, *x = a.x;
    vf acc[ROWS][PANELS * kPanelVecs] = {};
    const isize near = steps > kAhead ? steps - kAhead : 0;
    for (isize k = 0; k < steps; k++) {
        const isize ahead = (k + kAhead) * kLine<bf16> + (k < near ? 0 : (PANELS - 1) * stride);
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; p++) __builtin_prefetch(w + p * stride + ahead, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            Dot<bf16> dot(x + r * a.x_stride + k * 2);
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
                for (int v = 0; v < kPanelVecs; v++)
                    dot.add(acc[r][p * kPanelVecs + v], w + p * stride + k * kLine<bf16> + v * kLanes * 2);
        }
    }
    for (int r = 0; r < ROWS; r++) finish<PANELS>(a, r, first * kPanel, acc[r]);
}

inline void linear(const LinearArgs& a) {
    const isize panels = (a.out + kPanel - 1) / kPanel;
    if (a.rows > kStreamRows) {
        each_unit<kUnitPanels>(panels, a.rows, [&](Unit unit, auto count) {
            run_unit<decltype(count)::value>(a, unit, a.panels + unit.first_panel * a.in * kPanel);
        });
        return;
    }
    with_rows(int(a.rows), [&](auto height) {
        constexpr int ROWS = decltype(height)::value;
        if constexpr (ROWS <= kStreamRows)
            each_group<kTilePanels>(panels, [&](isize first, auto count) {
                stream_panels<ROWS, decltype(count)::value>(a, first);
            });
    });
}

}  // namespace octavo::OCTAVO_ISA
