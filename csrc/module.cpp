// Python's door: picks the table, turns addresses into arguments, and releases the interpreter while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(OCTAVO_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "blocks.h"
#include "pool.h"

namespace nb = nanobind;
using namespace octavo;

namespace {

// Raised with every change of what Python calls here, and with it `INTERFACE` in octavo/kernels/cpu_choice.py.
constexpr int INTERFACE = 2;

#if defined(OCTAVO_HAS_AMX)
// Whether the processor has tiles of the size that impl/amx.h uses and multiplies them in bfloat16, and Linux saves
// them and lets this process use them: it is asked here, for all threads (Documentation/arch/x86/xstate.rst).
bool has_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, -TILE
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    if ((b & 0xffff) != 64 || b >> 16 < 8 || (c & 0xffff) != 16) return false;  // bytes of a row, tiles, rows
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;        // OSXSAVE
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const Kernels*> find_supported() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#if defined(OCTAVO_HAS_AMX)
    if (bf16 && has_amx()) tables.push_back(&amx_bf16_kernels());
#endif
    if (bf16) tables.push_back(&avx512_bf16_kernels());
    if (vnni) tables.push_back(&avx512_vnni_kernels());
    if (avx512) tables.push_back(&avx512_kernels());
    if (avx2 && __builtin_cpu_supports("avxvnni")) tables.push_back(&avx2_vnni_kernels());
    if (avx2) tables.push_back(&avx2_kernels());
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) tables.push_back(&neon_dotprod_kernels());
#endif
    tables.push_back(&baseline_kernels());
    return tables;
}

// What the processor (and the operating system) can run, best first.
const std::vector<const Kernels*>& supported() {
    static const std::vector<const Kernels*> tables = find_supported();
    return tables;
}

const Kernels* active = supported().front();

std::vector<std::string> names() {
    std::vector<std::string> out;
    for (const Kernels* k : supported()) out.emplace_back(k->name);
    return out;
}

std::vector<std::string> emulated() { return {amx_emulated_kernels().name}; }

void use(const std::string& name) {
    std::vector<const Kernels*> tables = supported();
    tables.push_back(&amx_emulated_kernels());
    for (const Kernels* k : tables)
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

void norm(bool bf16, bool wide, address x, address residual, address weight, address out, address sum, isize rows, isize cols,
          isize x_stride, isize residual_stride, float eps) {
    active->norm(type_of(bf16),
                 {at(x), at(residual), at(weight), at(out), at(sum), rows, cols, x_stride, residual_stride, eps, wide});
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

using part = std::tuple<std::string, address, isize>;  // "bf16" or a block type's name, panels, outputs

Format format_of(const std::string& name) {
    if (name == "bf16") return Format::bf16;
    if (const BlockType* type = block_type(name.c_str())) return type->format;
    throw std::invalid_argument("there are no panels of the type '" + name + "'");
}

void make_weight(Weight* self, const std::vector<part>& parts, address bias, isize in) {
    if (parts.empty() || parts.size() > kMaxParts) throw std::invalid_argument("a weight has one to three parts");
    new (self) Weight{{}, 0, at(bias), in, 0};
    for (const part& p : parts) {
        self->parts[self->count++] = {format_of(std::get<0>(p)), at(std::get<1>(p)), std::get<2>(p)};
        self->out += std::get<2>(p);
    }
}

void product(const Weight& self, bool bf16, address x, address out, isize rows, isize x_stride) {
    active->product(type_of(bf16), self, {at(x), at(out), rows, x_stride});
}

void gather(const Weight& self, bool bf16, address ids, address out, isize count) {
    raise(active->gather(type_of(bf16), self, {at<int32_t>(ids), at(out), count}));
}

isize bytes_of_panels(const std::string& type, isize out, isize in) { return panel_bytes(format_of(type), out, in); }

void pack(const std::string& type, address blocks, isize out, isize in, address panels) {
    pack_blocks(*block_type(type.c_str()), at(blocks), out, in, at(panels));
}

void quantise(bool bf16, address weight, isize out, isize in, address panels) {
    pack_int8(type_of(bf16), at(weight), out, in, at(panels));
}

void argmax(bool bf16, address x, address out, isize rows, isize cols, isize x_stride) {
    active->argmax(type_of(bf16), {at(x), at<int64_t>(out), rows, cols, x_stride});
}

void greedy(bool bf16, address x, address out, isize rows, isize cols, isize x_stride) {
    active->greedy(type_of(bf16), {at(x), at<int32_t>(out), rows, cols, x_stride});
}

void sample(bool bf16, address x, address settings, address out, isize rows, isize cols, isize x_stride) {
    active->sample(type_of(bf16), {at(x), at<int32_t>(settings), at<int32_t>(out), rows, cols, x_stride});
}

void logprobs(bool bf16, address x, address tokens, address out, isize rows, isize cols, isize x_stride, isize count) {
    raise(active->logprobs(type_of(bf16),
                           {at(x), at<int32_t>(tokens), at<int32_t>(out), rows, cols, x_stride, count}));
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

// Sorts pairs of a token and an expert by expert, those of one expert by token: see kernels/metadata.py, Groups.
void group(address experts, isize tokens, isize each, isize count, address rows, address places, address starts) {
    auto* ids = at<int64_t>(experts);
    auto *row = at<int32_t>(rows), *place = at<int32_t>(places), *start = at<int32_t>(starts);
    std::vector<int32_t> next(count + 1);
    for (isize i = 0; i < tokens * each; i++)
        if (ids[i] >= 0 && ids[i] < count) next[ids[i] + 1]++;
    for (isize e = 0; e < count; e++) next[e + 1] += next[e];
    std::copy(next.begin(), next.end(), start);
    std::fill(row + start[count], row + tokens * each, 0);
    for (isize i = 0; i < tokens * each; i++) {
        const bool known = ids[i] >= 0 && ids[i] < count;
        place[i] = known ? next[ids[i]]++ : -1;
        if (known) row[place[i]] = int32_t(i / each);
    }
}

void make_experts(ExpertWeight* self, address panels, address bias, isize experts, isize in, isize out) {
    new (self) ExpertWeight{at(panels), at(bias), experts, in, out};
}

void grouped(const ExpertWeight& self, address x, address out, address rows, address starts, isize x_stride) {
    active->grouped(self, {at(x), at(out), at<int32_t>(rows), at<int32_t>(starts), x_stride});
}

void combine(bool bf16, address y, address out, address weights, address places, isize tokens, isize each, isize cols) {
    active->combine(type_of(bf16), {at(y), at(out), at<float>(weights), at<int32_t>(places), tokens, each, cols});
}

void make_layer(LayerArgs* self, const Weight& qkv, const Weight& o, const Weight& gate_up, const Weight& down,
                address input_norm, address post_norm, address q_norm, address k_norm, float eps, bool silu) {
    new (self) LayerArgs{qkv, o, gate_up, down, at(input_norm), at(post_norm), at(q_norm), at(k_norm), eps,
                         silu ? Gate::silu : Gate::gelu_tanh};
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

// Layers by value; the tensors that their addresses are of belong to Python.
struct Decoder {
    std::vector<LayerArgs> layers;
    std::vector<int32_t> kinds;
    const void* norm;
    float eps;
};

void make_decoder(Decoder* self, const std::vector<LayerArgs>& layers, const std::vector<int32_t>& kinds, address norm,
                  float eps) {
    if (layers.empty() || layers.size() != kinds.size()) throw std::invalid_argument("every layer has a kind");
    new (self) Decoder{layers, kinds, at(norm), eps};
}

// The first `count` layers.
void decoder(const Decoder& self, isize count, std::vector<LayerInput> steps, address x, address cache,
             isize cache_stride, address out, address wanted, isize wanted_count) {
    if (count < 1 || count > isize(self.layers.size())) throw std::invalid_argument("there are not so many layers");
    for (isize i = 0; i < count; i++)
        if (self.kinds[i] < 0 || self.kinds[i] >= isize(steps.size())) throw std::invalid_argument("a kind has no step");
    raise(active->decoder({self.layers.data(), self.kinds.data(), count, self.norm, self.eps},
                          {steps.data(), isize(steps.size()), at(x), at(out), at(cache), cache_stride,
                           at<int32_t>(wanted), wanted_count}));
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // a model may live until the interpreter ends
    using unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.doc() = "Kernels for processors. Arguments are addresses; octavo.kernels.cpu checks them and is the only caller.";
    m.attr("INTERFACE") = INTERFACE;
    m.def("names", &names, "The instruction sets this processor can run, best first.");
    m.def("emulated", &emulated, "Instruction sets that run slowly on every processor, for tests alone.");
    m.def("use", &use, "Run the kernels of this name from now on.");
    m.def("active", [] { return std::string(active->name); });
    m.def("set_threads", &set_threads, "How many threads share a kernel's work.");
    m.def("threads", &threads);
    m.def("norm", &norm, unlocked());
    m.def("gate", &gate, unlocked());
    m.def("rotary", &rotary, unlocked());
    m.def("store", &store, unlocked());
    m.def("argmax", &argmax, unlocked());
    m.def("greedy", &greedy, unlocked());
    m.def("sample", &sample, unlocked());
    m.def("logprobs", &logprobs, unlocked());
    m.def("attention", &attention, unlocked());
    m.def("panel_bytes", &bytes_of_panels, "Of a weight [out, in] of this block type.");
    m.def("pack", &pack, unlocked(), "Blocks of GGUF's into panels.");
    m.def("quantise", &quantise, unlocked(), "A weight into panels of Q8_0.");
    nb::class_<Weight>(m, "Weight")
        .def("__init__", &make_weight)
        .def("product", &product, unlocked())
        .def("gather", &gather, unlocked());
    m.def("group", &group, unlocked());
    m.def("combine", &combine, unlocked());
    nb::class_<ExpertWeight>(m, "Experts").def("__init__", &make_experts).def("product", &grouped, unlocked());
    nb::class_<LayerInput>(m, "Step").def("__init__", &make_step);
    nb::class_<LayerArgs>(m, "Layer").def("__init__", &make_layer).def("run", &layer, unlocked());
    nb::class_<Decoder>(m, "Decoder").def("__init__", &make_decoder).def("run", &decoder, unlocked());
}
