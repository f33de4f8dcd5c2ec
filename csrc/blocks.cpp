#include "blocks.h"

#include <cmath>
#include <cstring>

#include "pool.h"

namespace octavo {

// q of a block, and d and m (the bits of halves) of its groups.
struct DecodedBlock {
    uint8_t q[256];
    uint16_t d[16], m[16];
};

namespace {

uint16_t half_at(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

void nibbles(const uint8_t* from, isize count, uint8_t* q) {
    for (isize i = 0; i < count; i++) q[i] = from[i] & 15, q[i + count] = from[i] >> 4;
}

// The fifth bits of 32 values.
void fifth_bits(const uint8_t* from, uint8_t* q) {
    for (isize i = 0; i < 32; i++) q[i] |= uint8_t((from[i / 8] >> i % 8 & 1) << 4);
}

void q4_0(const uint8_t* b, DecodedBlock& to) { to.d[0] = half_at(b), nibbles(b + 2, 16, to.q); }

void q4_1(const uint8_t* b, DecodedBlock& to) {
    to.d[0] = half_at(b), to.m[0] = half_at(b + 2), nibbles(b + 4, 16, to.q);
}

void q5_0(const uint8_t* b, DecodedBlock& to) {
    to.d[0] = half_at(b), nibbles(b + 6, 16, to.q), fifth_bits(b + 2, to.q);
}

void q5_1(const uint8_t* b, DecodedBlock& to) {
    to.d[0] = half_at(b), to.m[0] = half_at(b + 2), nibbles(b + 8, 16, to.q), fifth_bits(b + 4, to.q);
}

void q8_0(const uint8_t* b, DecodedBlock& to) {
    to.d[0] = half_at(b);
    for (isize i = 0; i < 32; i++) to.q[i] = b[2 + i] ^ 0x80;
}

// Eight scales and eight minima of six bits in 12 bytes, times d and -dmin.
void six_bit_scales(const uint8_t* b, DecodedBlock& to) {
    const float d = half_to_float(half_at(b)), dmin = half_to_float(half_at(b + 2));
    const uint8_t* s = b + 4;
    for (isize g = 0; g < 8; g++) {
        const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        const int minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
        to.d[g] = float_to_half(d * float(scale)), to.m[g] = float_to_half(-dmin * float(minimum));
    }
}

void q4_k(const uint8_t* b, DecodedBlock& to) {
    six_bit_scales(b, to);
    for (isize i = 0; i < 4; i++) nibbles(b + 16 + i * 32, 32, to.q + i * 64);
}

void q5_k(const uint8_t* b, DecodedBlock& to) {
    six_bit_scales(b, to);
    for (isize i = 0; i < 4; i++) nibbles(b + 48 + i * 32, 32, to.q + i * 64);
    for (isize i = 0; i < 256; i++) to.q[i] |= uint8_t((b[16 + i % 32] >> i / 32 & 1) << 4);
}

void q6_k(const uint8_t* b, DecodedBlock& to) {
    const float d = half_to_float(half_at(b + 208));
    for (isize g = 0; g < 16; g++) to.d[g] = float_to_half(d * float(int8_t(b[192 + g])));
    for (isize h = 0; h < 2; h++) {
        nibbles(b + h * 64, 64, to.q + h * 128);
        for (isize i = 0; i < 128; i++)
            to.q[h * 128 + i] |= uint8_t((b[128 + h * 32 + i % 32] >> 2 * (i / 32) & 3) << 4);
    }
}

constexpr BlockType kTypes[] = {
    {"Q4_0", Format::q4, 32, 18, q4_0},    {"Q4_1", Format::q4m, 32, 20, q4_1},
    {"Q5_0", Format::q5, 32, 22, q5_0},    {"Q5_1", Format::q5m, 32, 24, q5_1},
    {"Q8_0", Format::q8, 32, 34, q8_0},    {"Q4_K", Format::q4m, 256, 144, q4_k},
    {"Q5_K", Format::q5m, 256, 176, q5_k}, {"Q6_K", Format::q6, 256, 210, q6_k},
};

// Where the bits of input `k` of a group of output `column` are in its record.
struct Place {
    isize low, high;
    int low_shift, high_shift;
};
constexpr Place place(const BlockShape& s, isize k, isize column) {
    const isize quad = k / 4, byte = column * 4 + k % 4;
    if (s.bits == 8) return {lines_at(s) + quad * 64 + byte, 0, 0, 0};
    return {lines_at(s) + quad / 2 * 64 + byte, rest_at(s) + byte, int(quad % 2) * 4, int(quad) * (s.bits - 4)};
}

// One output's part of a record that was zero before.
template <Format F>
void put(uint8_t* record, isize column, const uint8_t* q, uint16_t d, uint16_t m) {
    constexpr BlockShape s = block_shape(F);
    std::memcpy(record + column * 2, &d, 2);
    if (s.minimum) std::memcpy(record + 32 + column * 2, &m, 2);
    for (isize k = 0; k < s.group; k++) {
        const Place p = place(s, k, column);
        if (s.bits == 8) {
            record[p.low] = q[k];
            continue;
        }
        record[p.low] |= uint8_t((q[k] & 15) << p.low_shift);
        if (s.bits > 4) record[p.high] |= uint8_t(q[k] >> 4 << p.high_shift);
    }
}

// Fills panels with blocks of `values` inputs, which decode(output, index, block) decodes. Panels are shared out.
template <Format F, class Decode>
void pack(isize values, isize out, isize in, void* panels, Decode decode) {
    constexpr BlockShape s = block_shape(F);
    constexpr isize record = record_bytes(s);
    auto fill = [=](isize p) {
        uint8_t* panel = (uint8_t*)panels + p * (in / s.group * record);
        std::memset(panel, 0, in / s.group * record);
        DecodedBlock block;
        for (isize c = 0; c < kPanel && p * kPanel + c < out; c++)
            for (isize b = 0; b < in / values; b++) {
                decode(p * kPanel + c, b, block);
                for (isize g = 0; g < values / s.group; g++)
                    put<F>(panel + (b * values / s.group + g) * record, c, block.q + g * s.group, block.d[g], block.m[g]);
            }
    };
    share((out + kPanel - 1) / kPanel, [](void* c, isize first, isize last) {
        for (isize p = first; p < last; p++) (*(decltype(fill)*)c)(p);
    }, &fill);
}

}  // namespace

const BlockType* block_type(const char* name) {
    for (const BlockType& type : kTypes)
        if (!std::strcmp(type.name, name)) return &type;
    return nullptr;
}

isize panel_bytes(Format format, isize out, isize in) {
    const BlockShape s = block_shape(format);
    return (out + kPanel - 1) / kPanel * (in / s.group) * record_bytes(s);
}

void pack_blocks(const BlockType& type, const void* blocks, isize out, isize in, void* panels) {
    const isize row = in / type.values * type.bytes;
    auto decode = [=, &type](isize o, isize b, DecodedBlock& to) {
        type.decode((const uint8_t*)blocks + o * row + b * type.bytes, to);
    };
    switch (type.format) {
        case Format::q4: return pack<Format::q4>(type.values, out, in, panels, decode);
        case Format::q4m: return pack<Format::q4m>(type.values, out, in, panels, decode);
        case Format::q5: return pack<Format::q5>(type.values, out, in, panels, decode);
        case Format::q5m: return pack<Format::q5m>(type.values, out, in, panels, decode);
        case Format::q6: return pack<Format::q6>(type.values, out, in, panels, decode);
        default: return pack<Format::q8>(type.values, out, in, panels, decode);
    }
}

void pack_int8(DType type, const void* weight, isize out, isize in, void* panels) {
    pack<Format::q8>(32, out, in, panels, [=](isize o, isize b, DecodedBlock& to) {
        float x[32], most = 0;
        for (isize i = 0; i < 32; i++) {
            const isize at = o * in + b * 32 + i;
            if (type == DType::f32) {
                x[i] = ((const float*)weight)[at];
            } else {
                const uint32_t bits = uint32_t(((const uint16_t*)weight)[at]) << 16;
                std::memcpy(&x[i], &bits, 4);
            }
            most = std::fmax(most, std::fabs(x[i]));
        }
        to.d[0] = float_to_half(most / 127);
        const float d = half_to_float(to.d[0]), inverse = d > 0 ? 1 / d : 0;
        for (isize i = 0; i < 32; i++) {
            const float q = std::nearbyint(x[i] * inverse);
            to.q[i] = uint8_t(128 + int(q > 127 ? 127 : q < -127 ? -127 : q));
        }
    });
}

void unpack_row(const Part& part, isize in, isize row, float* out) {
    const BlockShape s = block_shape(part.format);
    const isize record = record_bytes(s), column = row % kPanel;
    auto* r = (const uint8_t*)part.panels + row / kPanel * (in / s.group) * record;
    for (isize g = 0; g < in / s.group; g++, r += record) {
        const float d = half_to_float(half_at(r + column * 2));
        const float m = s.minimum ? half_to_float(half_at(r + 32 + column * 2)) : 0;
        for (isize k = 0; k < s.group; k++) {
            const Place p = place(s, k, column);
            int q = s.bits == 8 ? r[p.low] : r[p.low] >> p.low_shift & 15;
            if (s.bits == 5 || s.bits == 6) q |= (r[p.high] >> p.high_shift & (s.bits == 5 ? 1 : 3)) << 4;
            out[g * s.group + k] = d * (float(q) - s.zero) + m;
        }
    }
}

}  // namespace octavo
