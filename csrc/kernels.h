// The table of kernels. Each instruction set compiles csrc/impl once, in a namespace of its own, and fills one table;
// module.cpp picks a table by what the processor reports. Nothing here knows torch: tensors are addresses that the
// Python side (octavo/kernels/cpu.py) has checked. Strides are in elements; the last dimension is dense everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

using isize = std::ptrdiff_t;

enum class DType { f32, bf16 };

// Weights are kept in panels of 16 output columns: bf16 panels are [in / 2][16][2], so that one 64-byte line holds one
// pair of inputs for 16 outputs; f32 panels are [in][16].
constexpr isize kPanel = 16;

struct NormArgs {
    const void *x, *residual, *weight;  // residual may be null
    void *out, *sum;                    // sum only with residual
    isize rows, cols, x_stride, residual_stride;
    float eps;
};

enum class Gate { silu, gelu_tanh };

struct GateArgs {
    const void* x;  // [rows, 2 * cols]
    void* out;      // [rows, cols]
    isize rows, cols, x_stride;
    Gate gate;
};

struct RotaryArgs {
    const void* x;  // [tokens, heads, dim]
    void* out;      // the same, dense
    const float* cos_sin;
    const int32_t* positions;
    isize tokens, heads, dim, rotated, x_stride, max_len;
};

struct StoreArgs {
    void* cache;  // [pages, 2, heads, page_size, dim]
    const void *key, *value;
    const int32_t* slots;
    isize tokens, heads, dim, page_size, pages, key_stride, value_stride, element;
};

struct LinearArgs {
    const void* x;       // [rows, in] bf16
    const void* panels;  // packed weight
    const void* bias;    // [out] bf16 or null
    void* out;           // [rows, out]
    isize rows, in, out_features, x_stride, out_stride;
};

struct AttentionArgs {
    const void *query, *cache;
    void* out;
    const int32_t *query_start, *seq_lens, *rows, *block_table;
    const float* sinks;  // [heads] or null
    isize items, heads, kv_heads, dim, page_size, pages, table_rows, table_width, query_stride, tokens;
    isize window;   // 0: none
    float scale, softcap;  // softcap 0: none
};

struct ArgmaxArgs {
    const void* x;  // [rows, cols]
    int64_t* out;   // [rows]
    isize rows, cols, x_stride;
};

// A packed weight.
struct Weight {
    const void *panels, *bias;  // bias may be null
    isize in, out;
};

// One decoder layer in bf16: norm, attention, norm, gated MLP, with the residual kept apart.
struct LayerArgs {
    Weight qkv, o, gate_up, down;
    const void *input_norm, *post_norm, *q_norm, *k_norm;  // the norms of heads may be null
    float eps;
    Gate gate;
};

// What a layer is run on. `step.query`, `step.out` and `step.query_stride` are the layer's own business.
struct LayerInput {
    const void *x, *residual;  // residual may be null
    void *out, *sum;           // the layer's output, and the residual it has yet to be added to
    const float* cos_sin;      // null: no rotation
    const int32_t *positions, *slots;
    isize rotated, max_len;
    AttentionArgs step;
};

// Kernels return null, or a message about an index out of range; nothing has been read through such an index.
struct Kernels {
    const char* name;
    void (*norm)(DType, const NormArgs&);
    void (*gate)(DType, const GateArgs&);
    const char* (*rotary)(DType, const RotaryArgs&);
    const char* (*store)(const StoreArgs&);
    void (*linear)(const LinearArgs&);
    void (*argmax)(DType, const ArgmaxArgs&);
    const char* (*attention)(DType, const AttentionArgs&);
    const char* (*layer)(const LayerArgs&, const LayerInput&);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

// A buffer of the calling thread, 64-byte aligned, that lives until the thread asks for a larger one of the same slot.
enum class Scratch { items, partials, tile, layer, count };
void* scratch(Scratch slot, std::size_t bytes);

}  // namespace octavo
