// Weights in blocks of few bits, as GGUF files have them, repacked into panels.
//
// A value is d * q + m, with q of `bits` bits and without a sign, d and m (float16) shared by `group` inputs of one
// output; or d * (q - zero) where no minimum is stored. A panel of 16 outputs is one record for each group of inputs:
//   16 d; 16 m, if stored
//   lines of 64 bytes: 16 outputs x 4 neighbouring inputs (a quad), which is what one dot instruction takes. 8 bits:
//   line i is quad i. Fewer: line i has the low four bits of quad 2 i in its low halves of bytes, of 2 i + 1 in the high
//   5 and 6 bits: one line more, with the remaining bits of quad i at bit i or 2 i of each byte
#pragma once

#include <cstring>

#include "kernels.h"

namespace octavo {

struct BlockShape {
    int bits, group;
    bool minimum;
    float zero;
};

constexpr BlockShape block_shape(Format f) {
    switch (f) {
        case Format::q4: return {4, 32, false, 8};
        case Format::q4m: return {4, 32, true, 0};
        case Format::q5: return {5, 32, false, 16};
        case Format::q5m: return {5, 32, true, 0};
        case Format::q6: return {6, 16, false, 32};
        default: return {8, 32, false, 128};
    }
}
constexpr isize lines_at(const BlockShape& s) { return s.minimum ? 64 : 32; }
constexpr isize rest_at(const BlockShape& s) { return lines_at(s) + s.group * (s.bits == 8 ? 16 : 8); }
constexpr isize record_bytes(const BlockShape& s) { return rest_at(s) + (s.bits == 5 || s.bits == 6 ? 64 : 0); }

inline float half_to_float(uint16_t h) {
    // The exponent of a half becomes that of a float by a multiplication, which is right for subnormal ones, too.
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    out *= 0x1p112f;
    return h & 0x8000 ? -out : out;
}

// Rounds to nearest, ties to even; what is too large becomes the largest.
inline uint16_t float_to_half(float x) {
    const uint16_t sign = x < 0 ? 0x8000 : 0;
    float size = x < 0 ? -x : x;
    if (!(size < 65504.0f)) size = 65504.0f;
    uint32_t bits;
    if (size < 0x1p-14f) {  // subnormal, in steps of 2^-24, which is also the step of floats from 0.5 on
        size += 0.5f;
        std::memcpy(&bits, &size, 4);
        return uint16_t((bits - 0x3f000000) | sign);
    }
    std::memcpy(&bits, &size, 4);
    return uint16_t((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13 | sign);
}

struct DecodedBlock;

// A type of GGUF: its name there, what it becomes here, how many values and bytes a block has.
struct BlockType {
    const char* name;
    Format format;
    isize values, bytes;
    void (*decode)(const uint8_t* block, DecodedBlock& to);
};
// Null for a name that is not known.
const BlockType* block_type(const char* name);

// Bytes of the panels of a weight [out, in].
isize panel_bytes(Format format, isize out, isize in);

// Blocks [out, in / values][bytes] -> panels; the last one is filled up with zeros.
void pack_blocks(const BlockType& type, const void* blocks, isize out, isize in, void* panels);

// bf16 or f32 [out, in] -> panels of q8, each group of 32 by its greatest value.
void pack_int8(DType type, const void* weight, isize out, isize in, void* panels);

// Row `row` of a part made of blocks.
void unpack_row(const Part& part, isize in, isize row, float* out);

}  // namespace octavo
