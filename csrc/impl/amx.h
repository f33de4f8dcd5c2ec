// Products by the tiles of AMX: up to 16 rows of x by 16 pairs of inputs, times the same pairs by 16 outputs. These are
// 16 steps of a panel as it lies (see kernels.h), so no weight is laid out anew.
//
// A tile adds even and odd inputs up apart, over 16 pairs, before it adds them to a sum (Intel's Software Developer's
// Manual, TDPBF16PS; the Intrinsics Guide has another order), where VDPBF16PS adds pair by pair; both round to nearest
// and take denormals for zero. A row's sum is the same to the last bit whatever else is in its tile, but perhaps not
// that of VDPBF16PS. For a row's result not to depend on how many rows there are, tiles multiply one row, too. By
// arithmetic that costs nothing: 16 cycles for 1 KB of a weight, which is as long as 16 VDPBF16PS take and 8 times
// faster than a core's share of memory.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__) || defined(OCTAVO_EMULATED_AMX)
#define OCTAVO_AMX

namespace octavo::OCTAVO_ISA {

constexpr int kAmxRows = 16, kAmxPairs = 16;
constexpr isize kAmxLine = kPanel * 2, kAmxSums = kAmxRows * kPanel;  // elements of a pair in a panel, of a tile's sums
constexpr isize kAmxSteps = 16;  // x 32 inputs: two tiles' rows of x, 32 KB, stay in the first-level cache
constexpr isize kAmxAhead = 96;  // pairs

// What LDTILECFG reads: the shape of each tile.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace octavo::OCTAVO_ISA

#if defined(OCTAVO_EMULATED_AMX)
#include "amx_emulation.h"
#else
#include "amx_instructions.h"
#endif

namespace octavo::OCTAVO_ISA {

// The tiles of this thread, from here to the end of the block that this is in: 0 to 3 are sums, 4 and 5 rows of x, 6
// and 7 pairs of inputs of a panel. A thread that has none of these objects has no tiles, and a tile instruction would
// end the process; a thread that is done with one leaves nothing behind that has to be saved or lowers the clock.
class Amx {
public:
    Amx(isize rows, isize pairs) {
        TileShapes shapes{};
        shapes.palette = 1;
        for (int t = 0; t < 8; t++) {
            shapes.rows[t] = uint8_t(t < 6 ? rows : pairs);
            shapes.bytes[t] = uint16_t(t == 4 || t == 5 ? pairs * 4 : kPanel * 4);
        }
        tmm::configure(shapes);
    }
    ~Amx() { tmm::release(); }
    Amx(const Amx&) = delete;
    Amx& operator=(const Amx&) = delete;

    template <int TILE>
    OCTAVO_DOT void zero() const { tmm::zero<TILE>(); }
    template <int TILE>
    OCTAVO_DOT void load(const void* from, isize stride) const { tmm::load<TILE>(from, stride); }
    template <int TILE>
    OCTAVO_DOT void store(void* to, isize stride) const { tmm::store<TILE>(to, stride); }
    template <int SUM, int X, int W>
    OCTAVO_DOT void multiply() const { tmm::multiply<SUM, X, W>(); }
};

// x [rows, 2 * pairs] times `width` panels; sums [tiles of rows, width, 16, 16].
struct AmxUnit {
    const bf16 *x, *panels;
    float* sums;
    isize x_stride, panel_stride, rows, width;

    isize tiles() const { return (rows + kAmxRows - 1) / kAmxRows; }
    isize height() const { return rows < kAmxRows ? rows : kAmxRows; }
    // The first row of a tile. The last tile ends with the last row, and may have some of the one before it again, so
    // that all are of one height.
    isize first(isize tile) const { return tile * kAmxRows < rows - height() ? tile * kAmxRows : rows - height(); }
    float* sum(isize tile, isize panel) const { return sums + (tile * width + panel) * kAmxSums; }
    // What to ask for at a pair of inputs, in elements from there on. With few rows, which wait for memory, a few KB
    // further, past a panel's end in the group of panels that comes next; with many rows, the same place of that group.
    isize ahead(isize pair) const {
        if (rows > kAmxRows) return width * panel_stride;
        const isize near = (pair + kAmxAhead) * kAmxLine < panel_stride ? 0 : (width - 1) * panel_stride;
        return near + kAmxAhead * kAmxLine;
    }
};

// f<tile of sums>(row, panel) for each of ROWS x PANELS.
template <int ROWS, int PANELS, class F>
OCTAVO_INLINE void each_sum(F&& f) {
    f(std::integral_constant<int, 0>{}, 0, 0);
    if constexpr (PANELS == 2) f(std::integral_constant<int, 1>{}, 0, 1);
    if constexpr (ROWS == 2) f(std::integral_constant<int, 2>{}, 1, 0);
    if constexpr (ROWS == 2 && PANELS == 2) f(std::integral_constant<int, 3>{}, 1, 1);
}

// Adds `steps` steps of `pairs` pairs, those from pair `from` on, to the sums of ROWS tiles of rows and PANELS panels.
template <int ROWS, int PANELS>
OCTAVO_INLINE void amx_block(const Amx& amx, const AmxUnit& u, isize tile, isize panel, isize from, isize pairs,
                             isize steps) {
    const isize stride = u.x_stride * isize(sizeof(bf16)), line = kAmxLine * isize(sizeof(bf16));
    const bf16 *x0 = u.x + u.first(tile) * u.x_stride + from * 2, *x1 = u.x + u.first(tile + 1) * u.x_stride + from * 2;
    const bf16 *w0 = u.panels + panel * u.panel_stride + from * kAmxLine, *w1 = w0 + u.panel_stride;
    // Each time around asks for its share of what comes next, or memory would hold up the first.
    const isize place = tile / 2, places = (u.tiles() + 1) / 2;
    const isize first = pairs * place / places, last = pairs * (place + 1) / places;
    each_sum<ROWS, PANELS>([&](auto sum, int r, int p) {
        if (from) amx.template load<sum()>(u.sum(tile + r, panel + p), kPanel * 4);
        else amx.template zero<sum()>();
    });
    for (isize s = 0; s < steps; s++) {
        const isize at = s * pairs * kAmxLine;
        for (isize i = first; i < last; i++) {
            const bf16* next = w0 + at + i * kAmxLine + u.ahead(from + s * pairs);
            __builtin_prefetch(next, 0, 2);
            if constexpr (PANELS == 2) __builtin_prefetch(next + u.panel_stride, 0, 2);
        }
        amx.load<4>(x0 + s * pairs * 2, stride);
        amx.load<6>(w0 + at, line);
        amx.multiply<0, 4, 6>();
        if constexpr (PANELS == 2) amx.load<7>(w1 + at, line), amx.multiply<1, 4, 7>();
        if constexpr (ROWS == 2) amx.load<5>(x1 + s * pairs * 2, stride), amx.multiply<2, 5, 6>();
        if constexpr (ROWS == 2 && PANELS == 2) amx.multiply<3, 5, 7>();
    }
    each_sum<ROWS, PANELS>([&](auto sum, int r, int p) {
        amx.template store<sum()>(u.sum(tile + r, panel + p), kPanel * 4);
    });
}

// Adds those steps to all sums, two tiles of rows at a time; before(tile) and after(tile) of each.
template <class Before, class After>
OCTAVO_INLINE void amx_steps(const Amx& amx, const AmxUnit& u, isize from, isize pairs, isize steps, Before&& before,
                             After&& after) {
    const isize tiles = u.tiles();
    for (isize tile = 0; tile < tiles; tile += 2) {
        const bool both = tile + 1 < tiles;
        for (isize t = tile; t <= tile + both; t++) before(t);
        for (isize panel = 0; panel < u.width; panel += 2) {
            const bool two = panel + 1 < u.width;
            if (both && two) amx_block<2, 2>(amx, u, tile, panel, from, pairs, steps);
            else if (both) amx_block<2, 1>(amx, u, tile, panel, from, pairs, steps);
            else if (two) amx_block<1, 2>(amx, u, tile, panel, from, pairs, steps);
            else amx_block<1, 1>(amx, u, tile, panel, from, pairs, steps);
        }
        for (isize t = tile; t <= tile + both; t++) after(t);
    }
}

// The sums of PANELS panels over `pairs` pairs. ask(row, rows) some time before finish(row, sums [PANELS * 16])
// of each row; of some rows twice.
template <int PANELS, class Ask, class Finish>
OCTAVO_INLINE void amx_unit(AmxUnit u, isize pairs, Ask&& ask, Finish&& finish) {
    const isize whole = pairs / kAmxPairs, rest = pairs % kAmxPairs;
    u.width = PANELS, u.panel_stride = pairs * kAmxLine;
    u.sums = (float*)scratch(Scratch::tile, u.tiles() * PANELS * kAmxSums * sizeof(float));
    auto before = [&](isize tile) { ask(u.first(tile), u.height()); };
    auto after = [&](isize tile) {
        for (isize r = 0; r < u.height(); r++) {
            vf sums[PANELS * kPanelVecs];
            for (int v = 0; v < PANELS * kPanelVecs; v++)
                sums[v] = load(u.sum(tile, v / kPanelVecs) + r * kPanel + v % kPanelVecs * kLanes);
            finish(u.first(tile) + r, sums);
        }
    };
    auto nothing = [](isize) {};
    if (whole) {
        const Amx amx(u.height(), kAmxPairs);
        const isize last = rest ? whole : (whole - 1) / kAmxSteps * kAmxSteps;  // where the last steps of all begin
        for (isize s = 0; s < last; s += kAmxSteps) {
            const isize steps = whole - s < kAmxSteps ? whole - s : kAmxSteps;
            amx_steps(amx, u, s * kAmxPairs, kAmxPairs, steps, nothing, nothing);
        }
        if (!rest) amx_steps(amx, u, last * kAmxPairs, kAmxPairs, whole - last, before, after);
    }
    if (rest) amx_steps(Amx(u.height(), rest), u, whole * kAmxPairs, rest, 1, before, after);
}

}  // namespace octavo::OCTAVO_ISA

#endif
