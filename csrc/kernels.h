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
// pair of inputs for 16 outputs; f32 panels are [in][16]; those of blocks are described in blocks.h.
constexpr isize kPanel = 16;

// What a weight's numbers are. Of blocks: so many bits each, m where a minimum is stored beside the scale.
enum class Format { bf16, q4, q4m, q5, q5m, q6, q8 };

// Rows of a weight that lie below one another and are of one format.
struct Part {
    Format format;
    const void* panels;
    isize out;
};

// A packed weight: what a checkpoint keeps in several tensors is several parts, if they are blocks.
constexpr int kMaxParts = 3;
struct Weight {
    Part parts[kMaxParts];
    int count;
    const void* bias;  // [out] in the type of the activations; may be null
    isize in, out;
};

struct NormArgs {
    const void *x, *residual, *weight;  // residual may be null
    void *out, *sum;                    // sum only with residual
    isize rows, cols, x_stride, residual_stride;
    float eps;
    bool wide = false;  // the weight is float32, whatever x is, and multiplies before anything is rounded
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

// x [rows, in] times weight: out [rows, weight.out], dense. Activations are bf16, or f32 if all parts are blocks.
struct ProductArgs {
    const void* x;
    void* out;
    isize rows, x_stride;
};

// `weight[ids]`, a row each: out [count, weight.in], dense.
struct GatherArgs {
    const int32_t* ids;
    void* out;
    isize count;
};

// One weight for each expert, all of one shape: in bf16, the panels of the experts one after the other.
struct ExpertWeight {
    const void *panels, *bias;  // bias [experts, out] or null
    isize experts, in, out;
};

// Rows starts[e] to starts[e + 1] of `out` [starts[experts], weight.out] are products with the weight of expert e. Row i
// is that of x's row rows[i], or of row i if `rows` is null.
struct GroupedArgs {
    const void* x;
    void* out;
    const int32_t *rows, *starts;
    isize x_stride;
};

// out [tokens, cols]: of each token the sum of `each` rows of y, at places[token][...], times their weights; a place
// below 0 is none.
struct CombineArgs {
    const void* y;
    void* out;
    const float* weights;
    const int32_t* places;
    isize tokens, each, cols;
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

struct GreedyArgs {
    const void* x;  // [rows, cols]
    int32_t* out;   // [2, rows]: the position of the greatest and 1 if that is finite, else 0 and 0
    isize rows, cols, x_stride;
};

// A token of each row, see kernels/sampling.py: the greatest where the temperature is 0, else drawn.
enum class Setting { key0, key1, top_k, temperature, top_p, min_p };
struct SampleArgs {
    const void* x;            // [rows, cols]
    const int32_t* settings;  // [6, rows], the last three by the bits of a float
    int32_t* out;             // [2, rows]: the token and 1 if the greatest logit is finite, else 0 and 0
    isize rows, cols, x_stride;
};

// Of `tokens` and of the `count` likeliest of each row: the log-probability of the token (its bits), how many are
// likelier and 1, ids of the likeliest (of equals, the lower first), their log-probabilities (bits). Of a row with NaN
// or +inf, or of -inf alone, all are NaN and the ids 0.
struct LogprobArgs {
    const void* x;  // [rows, cols]
    const int32_t* tokens;
    int32_t* out;  // [rows, 2 + 2 * count]
    isize rows, cols, x_stride, count;  // count <= cols
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

// The layers of a decoder and the norm after them; kinds[i] is the number of the input that layer i is run on.
struct DecoderArgs {
    const LayerArgs* layers;
    const int32_t* kinds;
    isize count;
    const void* norm;
    float eps;
};

// Inputs of all kinds, of which `x`, `residual`, `out`, `sum` and the cache are the decoder's business; `cache` is the
// first layer's, those of the others follow it `cache_stride` bytes apart. The result has a row for each of the `wanted`
// tokens, which ascend, or with a count below 0 for all.
struct DecoderInput {
    LayerInput* kinds;
    isize kind_count;
    const void* x;
    void *out, *cache;
    isize cache_stride;
    const int32_t* wanted;
    isize wanted_count;
};

// Kernels return null, or a message about an index out of range; nothing has been read through such an index.
struct Kernels {
    const char* name;
    void (*norm)(DType, const NormArgs&);
    void (*gate)(DType, const GateArgs&);
    const char* (*rotary)(DType, const RotaryArgs&);
    const char* (*store)(const StoreArgs&);
    void (*product)(DType, const Weight&, const ProductArgs&);
    const char* (*gather)(DType, const Weight&, const GatherArgs&);
    void (*argmax)(DType, const ArgmaxArgs&);
    void (*greedy)(DType, const GreedyArgs&);
    void (*sample)(DType, const SampleArgs&);
    const char* (*logprobs)(DType, const LogprobArgs&);
    const char* (*attention)(DType, const AttentionArgs&);
    const char* (*layer)(const LayerArgs&, const LayerInput&);
    const char* (*decoder)(const DecoderArgs&, const DecoderInput&);
    void (*grouped)(const ExpertWeight&, const GroupedArgs&);
    void (*combine)(DType, const CombineArgs&);
};

const Kernels& baseline_kernels();
const Kernels& amx_emulated_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx2_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_bf16_kernels();
#elif defined(__aarch64__)
const Kernels& neon_dotprod_kernels();
#endif

// Puts the k largest first, in descending order.
void sort_largest(uint64_t* values, isize count, isize k);

// A buffer of the calling thread, 64-byte aligned, that lives until the thread asks for a larger one of the same slot.
enum class Scratch { items, partials, tile, layer, decoder, singles, quantised, weights, count };
void* scratch(Scratch slot, std::size_t bytes);

}  // namespace octavo
