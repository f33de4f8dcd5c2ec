// Python's door: picks the table, turns addresses into arguments, and releases the interpreter while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pool.h"

namespace nb = nanobind;
using namespace octavo;

void* octavo::scratch(Scratch slot, std::size_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    struct Buffer {
        std::unique_ptr<void, Free> memory;
        std::size_t size = 0;
    };
    thread_local Buffer buffers[int(Scratch::count)];
    Buffer& b = buffers[int(slot)];
    if (bytes > b.size) {
        const std::size_t size = (bytes + 4095) / 4096 * 4096;
        b.memory.reset();
        b.size = 0;
        b.memory.reset(std::aligned_alloc(64, size));
        if (!b.memory) throw std::bad_alloc();
        b.size = size;
    }
    return b.memory.get();
}

namespace {

// What the processor (and the operating system) can run, best first.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_kernels());
    if (avx512) tables.push_back(&avx512_kernels());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2_kernels());
#endif
    tables.push_back(&baseline_kernels());
    return tables;
}

const Kernels* active = supported().front();

std::vector<std::string> names() {
    std::vector<std::string> out;
    for (const Kernels* k : supported()) out.emplace_back(k->name);
    return out;
}

void use(const std::string& name) {
    for (const Kernels* k : supported())
        if (name == k->name) {
            active = k;
            return;
        }
    throw std::invalid_argument("this processor cannot run the kernels '" + name + "'");
}

void raise(const char* wrong) {
    if (wrong) throw std::out_of_range(wrong);
}

using address = std::uintptr_t;
template <class T = void>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}
DType type_of(bool bf16) { return bf16 ? DType::bf16 : DType::f32; }

void norm(bool bf16, address x, address residual, address weight, address out, address sum, isize rows, isize cols,
          isize x_stride, isize residual_stride, float eps) {
    active->norm(type_of(bf16),
                 {at(x), at(residual), at(weight), at(out), at(sum), rows, cols, x_stride, residual_stride, eps});
}

void gate(bool bf16, bool silu, address x, address out, isize rows, isize cols, isize x_stride) {
    active->gate(type_of(bf16), {at(x), at(out), rows, cols, x_stride, silu ? Gate::silu : Gate::gelu_tanh});
}

void rotary(bool bf16, address x, address out, address cos_sin, address positions, isize tokens, isize heads, isize dim,
            isize rotated, isize x_stride, isize max_len) {
    raise(active->rotary(type_of(bf16), {at(x), at(out), at<float>(cos_sin), at<int32_t>(positions), tokens, heads, dim,
                                         rotated, x_stride, max_len}));
}

void store(address cache, address key, address value, address slots, isize tokens, isize heads, isize dim,
           isize page_size, isize pages, isize key_stride, isize value_stride, isize element) {
    raise(active->store({at(cache), at(key), at(value), at<int32_t>(slots), tokens, heads, dim, page_size, pages,
                         key_stride, value_stride, element}));
}

void linear(address x, address panels, address bias, address out, isize rows, isize in, isize out_features,
            isize x_stride) {
    active->linear({at(x), at(panels), at(bias), at(out), rows, in, out_features, x_stride, out_features});
}

void argmax(bool bf16, address x, address out, isize rows, isize cols, isize x_stride) {
    active->argmax(type_of(bf16), {at(x), at<int64_t>(out), rows, cols, x_stride});
}

// Rows of a bf16 weight, out of its panels.
void gather(address panels, address ids, address out, isize count, isize in, isize out_features) {
    auto* from = at<const uint32_t>(panels);
    auto* to = at<uint32_t>(out);
    auto* id = at<const int32_t>(ids);
    const isize pairs = in / 2;
    for (isize t = 0; t < count; t++)
        if (id[t] < 0 || id[t] >= out_features) raise("a token id is outside of the vocabulary");
    auto copy = [=](isize t) {
        const uint32_t* panel = from + id[t] / kPanel * pairs * kPanel + id[t] % kPanel;
        for (isize k = 0; k < pairs; k++) to[t * pairs + k] = panel[k * kPanel];
    };
    for (isize t = 0; t < count; t++) copy(t);
}

void attention(bool bf16, address query, address cache, address out, address query_start, address seq_lens, address rows,
               address block_table, address sinks, isize items, isize heads, isize kv_heads, isize dim, isize page_size,
               isize pages, isize table_rows, isize table_width, isize query_stride, isize tokens, isize window,
               float scale, float softcap) {
    raise(active->attention(
        type_of(bf16), {at(query), at(cache), at(out), at<int32_t>(query_start), at<int32_t>(seq_lens),
                        at<int32_t>(rows), at<int32_t>(block_table), at<float>(sinks), items, heads, kv_heads, dim,
                        page_size, pages, table_rows, table_width, query_stride, tokens, window, scale, softcap}));
}

using weight = std::tuple<address, address, isize, isize>;  // panels, bias, in, out
Weight weight_of(const weight& w) { return {at(std::get<0>(w)), at(std::get<1>(w)), std::get<2>(w), std::get<3>(w)}; }

void make_layer(LayerArgs* self, weight qkv, weight o, weight gate_up, weight down, address input_norm,
                address post_norm, address q_norm, address k_norm, float eps, bool silu) {
    new (self) LayerArgs{weight_of(qkv), weight_of(o), weight_of(gate_up), weight_of(down), at(input_norm),
                         at(post_norm), at(q_norm), at(k_norm), eps, silu ? Gate::silu : Gate::gelu_tanh};
}

// The part of a layer's input that all layers of one kind share in a step.
void make_step(LayerInput* self, address positions, address slots, address cos_sin, isize rotated, isize max_len,
               address query_start, address seq_lens, address rows, address block_table, isize items, isize heads,
               isize kv_heads, isize dim, isize page_size, isize pages, isize table_rows, isize table_width,
               isize tokens, isize window, float scale, float softcap) {
    AttentionArgs a{nullptr, nullptr, nullptr, at<int32_t>(query_start), at<int32_t>(seq_lens), at<int32_t>(rows),
                    at<int32_t>(block_table), nullptr, items, heads, kv_heads, dim, page_size, pages, table_rows,
                    table_width, 0, tokens, window, scale, softcap};
    new (self) LayerInput{nullptr, nullptr, nullptr, nullptr, at<float>(cos_sin), at<int32_t>(positions),
                          at<int32_t>(slots), rotated, max_len, a};
}

void layer(const LayerArgs& self, LayerInput in, address x, address residual, address cache, address out, address sum) {
    in.x = at(x), in.residual = at(residual), in.out = at(out), in.sum = at(sum), in.step.cache = at(cache);
    raise(active->layer(self, in));
}

}  // namespace

NB_MODULE(_cpu, m) {
    using unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.doc() = "Kernels for processors. Arguments are addresses; octavo.kernels.cpu checks them and is the only caller.";
    m.def("names", &names, "The instruction sets this processor can run, best first.");
    m.def("use", &use, "Run the kernels of this name from now on.");
    m.def("active", [] { return std::string(active->name); });
    m.def("set_threads", &set_threads, "How many threads share a kernel's work.");
    m.def("threads", &threads);
    m.def("norm", &norm, unlocked());
    m.def("gate", &gate, unlocked());
    m.def("rotary", &rotary, unlocked());
    m.def("store", &store, unlocked());
    m.def("linear", &linear, unlocked());
    m.def("argmax", &argmax, unlocked());
    m.def("gather", &gather, unlocked());
    m.def("attention", &attention, unlocked());
    nb::class_<LayerInput>(m, "Step").def("__init__", &make_step);
    nb::class_<LayerArgs>(m, "Layer").def("__init__", &make_layer).def("run", &layer, unlocked());
}
