// What amx_instructions.h has, in C++, for tests on processors without AMX: after the operations in Intel's Software
// Developer's Manual (LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS). What a processor answers with an exception ends the
// process here.
#pragma once

#include <cfloat>
#include <cstdio>
#include <cstdlib>

#include "vec.h"

namespace octavo::OCTAVO_ISA::tmm {

// A thread's tiles; without a palette it has none.
struct State {
    TileShapes shapes;
    unsigned char tiles[8][16][64];
};
inline thread_local State state;

inline void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "AMX emulation: %s\n", what);
    std::abort();
}

template <int TILE>
int rows_of() {
    static_assert(TILE >= 0 && TILE < 8);
    expect(state.shapes.palette == 1 && state.shapes.rows[TILE] && state.shapes.bytes[TILE],
           "a tile that this thread has not configured");
    return state.shapes.rows[TILE];
}
template <int TILE>
int bytes_of() {
    rows_of<TILE>();
    return state.shapes.bytes[TILE];
}

inline void configure(const TileShapes& shapes) {
    expect(shapes.palette == 1 && shapes.start_row == 0, "no such palette");
    for (unsigned char reserved : shapes.reserved) expect(!reserved, "a reserved byte is not 0");
    for (int t = 0; t < 16; t++) {
        expect(shapes.rows[t] <= 16 && shapes.bytes[t] <= 64, "a tile is larger than 16 rows of 64 bytes");
        expect(t < 8 || (!shapes.rows[t] && !shapes.bytes[t]), "there are 8 tiles");
        expect(!shapes.rows[t] == !shapes.bytes[t], "a tile has rows or columns alone");
    }
    state = {};
    state.shapes = shapes;
}
inline void release() { state = {}; }

template <int TILE>
void zero() {
    rows_of<TILE>();
    std::memset(state.tiles[TILE], 0, sizeof state.tiles[TILE]);
}
template <int TILE>
void load(const void* from, isize stride) {
    zero<TILE>();
    for (int r = 0; r < rows_of<TILE>(); r++)
        std::memcpy(state.tiles[TILE][r], (const char*)from + r * stride, bytes_of<TILE>());
}
template <int TILE>
void store(void* to, isize stride) {
    for (int r = 0; r < rows_of<TILE>(); r++)
        std::memcpy((char*)to + r * stride, state.tiles[TILE][r], bytes_of<TILE>());
}

// Denormals are zeros, of what comes in and of what goes out.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float element(const unsigned char* row, int i) {
    bf16 value;
    std::memcpy((void*)&value, row + 2 * i, 2);
    return flushed(widen(value));
}

// Sums of the products at even places and of those at odd ones, in order; then of the two; then of these and SUM.
template <int SUM, int X, int W>
void multiply() {
    static_assert(SUM != X && SUM != W && X != W);
    const int pairs = bytes_of<X>() / 4, columns = bytes_of<SUM>() / 4;
    expect(rows_of<SUM>() == rows_of<X>() && rows_of<W>() == pairs && bytes_of<W>() == bytes_of<SUM>() &&
               bytes_of<X>() % 4 == 0 && bytes_of<SUM>() % 4 == 0,
           "tiles that do not fit together");
    for (int m = 0; m < rows_of<SUM>(); m++) {
        float added[32] = {}, sum[16] = {};
        for (int k = 0; k < pairs; k++)
            for (int i = 0; i < 2 * columns; i++)
                added[i] = flushed(std::fma(element(state.tiles[X][m], 2 * k + i % 2),
                                            element(state.tiles[W][k], i), added[i]));
        std::memcpy(sum, state.tiles[SUM][m], 4 * columns);
        for (int n = 0; n < columns; n++)
            sum[n] = flushed(flushed(sum[n]) + flushed(added[2 * n] + added[2 * n + 1]));
        std::memcpy(state.tiles[SUM][m], sum, sizeof sum);
    }
}

}  // namespace octavo::OCTAVO_ISA::tmm
