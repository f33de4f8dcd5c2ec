// Norms, gated activations, rotary positions, and writing K and V to their slots.
#pragma once

#include "vec.h"

namespace octavo::OCTAVO_ISA {

template <class T, class W = T>
OCTAVO_INLINE void norm_row(const T* x, const T* residual, const W* weight, T* out, T* total, isize cols,
                            float eps) {
    vf squares{};
    float tail = 0;
    isize i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
        vf v = load(x + i);
        if (residual) {
            v = rounded<T>(v + load(residual + i));
            store(total + i, v);
        }
        squares += v * v;
    }
    for (; i < cols; i++) {
        float v = widen(x[i]);
        if (residual) {
            v = rounded<T>(v + widen(residual[i]));
            total[i] = narrow<T>(v);
        }
        tail += v * v;
    }
    const T* source = residual ? total : x;
    float scale = 1.0f / std::sqrt((sum(squares) + tail) / float(cols) + eps);
    for (i = 0; i + kLanes <= cols; i += kLanes)
        store(out + i, rounded<W>(load(source + i) * scale) * load(weight + i));
    for (; i < cols; i++)
        out[i] = narrow<T>(rounded<W>(widen(source[i]) * scale) * widen(weight[i]));
}

template <class T, class W>
void norm_of(const NormArgs& a) {
    parallel(a.rows > 1 && a.rows * a.cols >= kParallelFrom, a.rows, [&](isize row) {
        const T* residual = a.residual ? (const T*)a.residual + row * a.residual_stride : nullptr;
        T* total = a.residual ? (T*)a.sum + row * a.cols : nullptr;
        norm_row((const T*)a.x + row * a.x_stride, residual, (const W*)a.weight, (T*)a.out + row * a.cols, total,
                 a.cols, a.eps);
    });
}

inline void norm(DType type, const NormArgs& a) {
    if (type == DType::f32) return norm_of<float, float>(a);
    a.wide ? norm_of<bf16, float>(a) : norm_of<bf16, bf16>(a);
}

// x / (1 + e^-y)
OCTAVO_INLINE vf times_sigmoid(vf x, vf y) { return x / (1.0f + vexp2(vmin(splat(126.0f), y * -kLog2e))); }

OCTAVO_INLINE vf activate(Gate gate, vf x) {
    if (gate == Gate::silu) return times_sigmoid(x, x);
    const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return times_sigmoid(x, 2.0f * inner);  // 0.5 * (1 + tanh(inner)) without the cancellation
}

template <class T>
OCTAVO_INLINE void gate_row(const T* gate, const T* up, T* out, isize cols, Gate kind) {
    isize i = 0;
    for (; i + kLanes <= cols; i += kLanes) store(out + i, rounded<T>(activate(kind, load(gate + i))) * load(up + i));
    for (; i < cols; i++) {
        float active = activate(kind, splat(widen(gate[i])))[0];
        out[i] = narrow<T>(rounded<T>(active) * widen(up[i]));
    }
}

template <class T>
void gate_of(const GateArgs& a) {
    // Chunks of columns, so that one row, too, is shared out.
    const isize chunk = 1024, chunks = (a.cols + chunk - 1) / chunk;
    parallel(a.rows * a.cols >= kParallelFrom / 2, a.rows * chunks, [&](isize unit) {
        isize row = unit / chunks, first = unit % chunks * chunk;
        isize count = a.cols - first < chunk ? a.cols - first : chunk;
        const T* x = (const T*)a.x + row * a.x_stride + first;
        gate_row(x, x + a.cols, (T*)a.out + row * a.cols + first, count, a.gate);
    });
}

inline void gate(DType type, const GateArgs& a) { type == DType::f32 ? gate_of<float>(a) : gate_of<bf16>(a); }

// One head: half-split rotation of the first ``2 * half`` elements, each product rounded as torch does.
template <class T>
OCTAVO_INLINE void rotate(const T* x, T* out, const float* cos, const float* sin, isize half, isize dim) {
    isize i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        vf c = rounded<T>(load(cos + i)), s = rounded<T>(load(sin + i));
        vf first = load(x + i), second = load(x + half + i);
        store(out + i, rounded<T>(first * c) - rounded<T>(second * s));
        store(out + half + i, rounded<T>(second * c) + rounded<T>(first * s));
    }
    for (; i < half; i++) {
        float c = rounded<T>(cos[i]), s = rounded<T>(sin[i]), first = widen(x[i]), second = widen(x[half + i]);
        out[i] = narrow<T>(rounded<T>(first * c) - rounded<T>(second * s));
        out[half + i] = narrow<T>(rounded<T>(second * c) + rounded<T>(first * s));
    }
    for (i = 2 * half; i < dim; i++) out[i] = x[i];
}

template <class T>
void rotary_of(const RotaryArgs& a) {
    parallel(a.tokens * a.heads * a.dim >= kParallelFrom, a.tokens, [&](isize t) {
        const float* cos = a.cos_sin + a.positions[t] * a.rotated;
        for (isize h = 0; h < a.heads; h++)
            rotate((const T*)a.x + t * a.x_stride + h * a.dim, (T*)a.out + (t * a.heads + h) * a.dim, cos,
                   cos + a.rotated / 2, a.rotated / 2, a.dim);
    });
}

inline const char* rotary(DType type, const RotaryArgs& a) {
    for (isize t = 0; t < a.tokens; t++)
        if (a.positions[t] < 0 || a.positions[t] >= a.max_len) return "a position is outside of the rotary table";
    type == DType::f32 ? rotary_of<float>(a) : rotary_of<bf16>(a);
    return nullptr;
}

inline const char* store_kv(const StoreArgs& a) {
    for (isize t = 0; t < a.tokens; t++)
        if (a.slots[t] < 0 || a.slots[t] >= a.pages * a.page_size) return "a slot is outside of the KV cache";
    const isize row = a.dim * a.element, head = a.page_size * row;
    auto *key = (const char*)a.key, *value = (const char*)a.value;
    parallel(a.tokens * a.heads * a.dim >= kParallelFrom, a.tokens, [&](isize t) {
        char* page = (char*)a.cache + (a.slots[t] / a.page_size) * 2 * a.heads * head + (a.slots[t] % a.page_size) * row;
        for (isize h = 0; h < a.heads; h++) {
            std::memcpy(page + h * head, key + t * a.key_stride * a.element + h * row, row);
            std::memcpy(page + (a.heads + h) * head, value + t * a.value_stride * a.element + h * row, row);
        }
    });
    return nullptr;
}

}  // namespace octavo::OCTAVO_ISA
