// The instructions of AMX, one function each. Only `Amx` (amx.h) calls them. Written as assembly, since the compilers'
// own functions take the number of a tile as a literal and not as an argument of a template.
#pragma once

#include "vec.h"

namespace octavo::OCTAVO_ISA::tmm {

OCTAVO_INLINE void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
OCTAVO_INLINE void release() { asm volatile("tilerelease"); }

template <int TILE>
OCTAVO_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
OCTAVO_INLINE void load(const void* from, isize stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
OCTAVO_INLINE void store(void* to, isize stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int SUM, int X, int W>
OCTAVO_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

}  // namespace octavo::OCTAVO_ISA::tmm
