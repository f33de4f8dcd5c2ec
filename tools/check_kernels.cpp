// The kernels without Python: products, norms, gates, attention and argmax against plain loops. Ends with 0 if all agree.
// tools/check_kernels.py builds and runs it, for 64-bit Arm in an emulator, too.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/blocks.h"
#include "../csrc/pool.h"

using namespace octavo;

namespace {

std::mt19937 generator(0);
int failures = 0;

std::vector<float> normal(isize count) {
    std::normal_distribution<float> draw;
    std::vector<float> out(count);
    for (float& v : out) v = draw(generator);
    return out;
}

void expect(const char* name, const char* what, const std::vector<float>& got, const std::vector<double>& wanted,
            double limit) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        difference += (got[i] - wanted[i]) * (got[i] - wanted[i]);
        size += wanted[i] * wanted[i];
    }
    const double error = std::sqrt(difference / size);
    const bool wrong = !(error < limit);
    if (wrong) failures++;
    std::printf("%-14s %-10s relative error %.1e%s\n", name, what, error, wrong ? "  WRONG" : "");
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

std::vector<double> multiply(const std::vector<float>& x, const std::vector<float>& w, isize rows, isize out, isize in) {
    std::vector<double> y(rows * out);
    for (isize r = 0; r < rows; r++)
        for (isize o = 0; o < out; o++)
            for (isize k = 0; k < in; k++) y[r * out + o] += double(x[r * in + k]) * w[o * in + k];
    return y;
}

void check_blocks(const Kernels& kernels, const char* kind) {
    const BlockType& type = *block_type(kind);
    const isize out = 40, in = 512;
    std::vector<uint8_t> blocks(out * in / type.values * type.bytes), panels(panel_bytes(type.format, out, in));
    for (uint8_t& b : blocks) b = uint8_t(generator());
    // Where the scales are, which random bits would make huge: halves of about 0.02.
    const bool minimum = block_shape(type.format).minimum, last = !std::strcmp(kind, "Q6_K");
    for (size_t i = 0; i < blocks.size(); i += type.bytes) {
        blocks[i + (last ? 209 : 1)] = 0x24;
        if (minimum) blocks[i + 3] = 0xa4;
    }
    pack_blocks(type, blocks.data(), out, in, panels.data());
    const Weight weight{{{type.format, panels.data(), out}}, 1, nullptr, in, out};
    std::vector<float> values(out * in);
    for (isize o = 0; o < out; o++) unpack_row(weight.parts[0], in, o, values.data() + o * in);
    for (isize rows : {1, 7, 20}) {
        std::vector<float> x(rows * in), y(rows * out);  // numbers that int8 holds exactly
        for (isize i = 0; i < rows * in; i++) x[i] = float(i % 16 ? int(generator() % 255) - 127 : 127) / 64;
        kernels.product(DType::f32, weight, {x.data(), y.data(), rows, in});
        expect(kernels.name, kind, y, multiply(x, values, rows, out, in), 1e-5);
    }
}

void check_bf16(const Kernels& kernels, isize rows, isize out, isize in) {
    std::vector<float> w = normal(out * in), x = normal(rows * in), y(rows * out);
    std::vector<uint16_t> panels(out * in), given(rows * in), got(rows * out);
    for (isize o = 0; o < out; o++)
        for (isize k = 0; k < in; k++) {
            const uint16_t h = to_bf16(w[o * in + k]);
            panels[(o / 16 * (in / 2) + k / 2) * 32 + o % 16 * 2 + k % 2] = h, w[o * in + k] = from_bf16(h);
        }
    for (isize i = 0; i < rows * in; i++) given[i] = to_bf16(x[i]), x[i] = from_bf16(given[i]);
    const Weight weight{{{Format::bf16, panels.data(), out}}, 1, nullptr, in, out};
    kernels.product(DType::bf16, weight, {given.data(), got.data(), rows, in});
    for (isize i = 0; i < rows * out; i++) y[i] = from_bf16(got[i]);
    expect(kernels.name, "bf16", y, multiply(x, w, rows, out, in), 4e-3);
}

void check_small(const Kernels& kernels) {
    const isize rows = 3, cols = 70;
    const std::vector<float> x = normal(rows * 2 * cols), weight = normal(cols);
    std::vector<float> y(rows * cols);
    std::vector<double> wanted(rows * cols);
    kernels.norm(DType::f32, {x.data(), nullptr, weight.data(), y.data(), nullptr, rows, cols, cols, 0, 1e-5f});
    for (isize r = 0; r < rows; r++) {
        double squares = 0;
        for (isize i = 0; i < cols; i++) squares += double(x[r * cols + i]) * x[r * cols + i];
        for (isize i = 0; i < cols; i++)
            wanted[r * cols + i] = x[r * cols + i] / std::sqrt(squares / cols + 1e-5) * weight[i];
    }
    expect(kernels.name, "norm", y, wanted, 1e-6);
    kernels.gate(DType::f32, {x.data(), y.data(), rows, cols, 2 * cols, Gate::silu});
    for (isize r = 0; r < rows; r++)
        for (isize i = 0; i < cols; i++) {
            const double g = x[r * 2 * cols + i];
            wanted[r * cols + i] = g / (1 + std::exp(-g)) * x[r * 2 * cols + cols + i];
        }
    expect(kernels.name, "gate", y, wanted, 1e-6);
    int64_t best = -1;
    kernels.argmax(DType::f32, {x.data(), &best, 1, cols, cols});
    for (isize i = 0; i < cols; i++)
        if (x[i] > x[best]) failures++;
}

// One sequence of `length` tokens, the last `queries` of which are asked for, over pages of 16 in reverse order.
void check_attention(const Kernels& kernels, isize length, isize queries) {
    const isize heads = 4, kv_heads = 2, dim = 32, pages = (length + 15) / 16, tile = 16 * dim;
    const std::vector<float> cache = normal(pages * 2 * kv_heads * tile), q = normal(queries * heads * dim);
    std::vector<float> y(queries * heads * dim);
    std::vector<double> wanted(queries * heads * dim);
    std::vector<int32_t> table(pages);
    for (isize p = 0; p < pages; p++) table[p] = int32_t(pages - 1 - p);
    const int32_t starts[2] = {0, int32_t(queries)}, lengths[1] = {int32_t(length)}, row[1] = {0};
    AttentionArgs a{q.data(), cache.data(), y.data(), starts, lengths, row, table.data(), nullptr, 1, heads, kv_heads,
                    dim, 16, pages, 1, pages, heads * dim, queries, 0, 0.2f, 0};
    if (kernels.attention(DType::f32, a)) failures++;
    for (isize t = 0; t < queries; t++)
        for (isize h = 0; h < heads; h++) {
            const isize kv = h / (heads / kv_heads), seen = length - queries + t + 1;
            auto at = [&](isize token, isize which) {
                return cache.data() + (table[token / 16] * 2 + which) * kv_heads * tile + kv * tile + token % 16 * dim;
            };
            const float* query = q.data() + (t * heads + h) * dim;
            double total = 0, *out = wanted.data() + (t * heads + h) * dim;
            for (isize k = 0; k < seen; k++) {
                double score = 0;
                for (isize d = 0; d < dim; d++) score += double(query[d]) * at(k, 0)[d];
                const double weight = std::exp(0.2 * score);
                total += weight;
                for (isize d = 0; d < dim; d++) out[d] += weight * at(k, 1)[d];
            }
            for (isize d = 0; d < dim; d++) out[d] /= total;
        }
    expect(kernels.name, queries == 1 ? "decode" : "prefill", y, wanted, 1e-5);
}

}  // namespace

int main() {
    set_threads(2);
    std::vector<const Kernels*> tables{&baseline_kernels(), &amx_emulated_kernels()};
#if defined(__aarch64__)
    tables.push_back(&neon_dotprod_kernels());
#endif
    for (const Kernels* kernels : tables) {
        for (const char* kind : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
            check_blocks(*kernels, kind);
        check_bf16(*kernels, 1, 48, 96);
        check_bf16(*kernels, 9, 48, 130);
        check_bf16(*kernels, 250, 80, 1090);
        check_small(*kernels);
        check_attention(*kernels, 100, 1);
        check_attention(*kernels, 100, 40);
    }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
