// A token drawn from each row of logits. kernels/sampling.py says what is computed: the noise, the race, the filters.
#pragma once

#include "sample.h"
#include "select.h"

namespace octavo::OCTAVO_ISA {

// --- noise and race -------------------------------------------------------------------------------------------------

// u of E = -log(1 - u) for each token: at least 2^-32, and below 1.
struct Noise {
    static constexpr uint32_t kStep = 0x9E3779B1u;
    vu first;  // of the hash, for the tokens of the first vector
    uint32_t key;

    explicit Noise(const uint32_t* keys) : key(keys[1]) {
        for (int lane = 0; lane < kLanes; lane++) first[lane] = uint32_t(lane) * kStep + keys[0];
    }

    // For the tokens from i on.
    vf uniform(isize i) const {
        vu h = first + uint32_t(i) * kStep;
        h = (h ^ h >> 16) * 0x7FEB352Du + key;
        h = (h ^ h >> 15) * 0x846CA68Bu;
        h ^= (vu)((vi)h >> 16);
        return __builtin_convertvector((vi)h, vf) * 0x1.fffffcp-32f + 0x1p-32f;
    }
};

// exp(x) or up to 7 % more, for x up to 0. Floats whose bits grow evenly are chords of the curve between powers of 2.
OCTAVO_INLINE vf exp_or_more(vf x) {
    const vf bits = vmax(splat(-80.0f), x) * 12102203.16f + (127 * 8388608.0f + 1024);  // more than what rounding takes
    return (vf)__builtin_convertvector(bits, vi);
}

// A run of the race: `best` is the score of the `winner` so far.
struct Race {
    Noise noise;
    float least;
    double best = 1.0 / 16;  // E is below 16: the weight of 1 scores more
    int32_t winner = 0;

    // Apart, so that the loop over all tokens keeps its constants in registers.
    __attribute__((noinline)) void enter(isize first, vf weight) {
        const vf u = noise.uniform(first);
        for (int lane = 0; lane < kLanes; lane++) {
            if (weight[lane] < least || weight[lane] <= u[lane] * float(best)) continue;
            const double score = double(weight[lane]) / -::log1p(-double(u[lane]));
            if (score > best) best = score, winner = int32_t(first + lane);
        }
    }
};

// The token of the greatest weight / E, the lowest of equals, among those of a weight of `least` or more, one of which
// has a weight of 1. `weights(i)` are those of the tokens from i on, `bounds(i)` at least as much.
//
// E takes a logarithm, but is above u, so a token whose bound / u is not ahead has lost: few are left to look at.
template <class W, class B>
OCTAVO_INLINE int32_t race(isize cols, const uint32_t* key, float least, W weights, B bounds) {
    Race race{Noise(key), least};
    for (isize first = 0; first < cols; first += kLanes) {
        const vf bound = bounds(first);
        const vi passes = bound >= least;
        if (!any(passes)) continue;
        if (any(passes & (bound > race.noise.uniform(first) * float(race.best)))) race.enter(first, weights(first));
    }
    return race.winner;
}

// --- filters --------------------------------------------------------------------------------------------------------

typedef float half_vf __attribute__((vector_size(kLanes * 2)));
typedef int32_t half_vi __attribute__((vector_size(kLanes * 2)));
typedef double vd __attribute__((vector_size(kLanes * 4)));

// The sum of those of `values` that are at least `least`; count is a multiple of kLanes.
OCTAVO_INLINE double mass_from(const float* values, isize count, float least) {
    vd sums[2] = {};
    for (isize i = 0; i < count; i += kLanes)
        for (int part = 0; part < 2; part++) {
            half_vf v;
            std::memcpy(&v, values + i + part * (kLanes / 2), sizeof v);
            v = (half_vf)((half_vi)v & (v >= least));
            sums[part] += __builtin_convertvector(v, vd);
        }
    const vd both = sums[0] + sums[1];
    double total = 0;
    for (int lane = 0; lane < kLanes / 2; lane++) total += both[lane];
    return total;
}

// Copies those of `values` that `passes`, filled up with zeros to whole vectors; returns how many then. `kept` may be
// `values`, and has room for kLanes more.
template <class P>
OCTAVO_INLINE isize keep(const float* values, isize count, float* kept, P passes) {
    isize found = 0;
    for (isize i = 0; i < count; i += kLanes) {
        const vf v = load(values + i);
        const vi mask = passes(v);
        if (!any(mask)) continue;
#if defined(__AVX512F__)
        const __mmask16 bits = _mm512_movepi32_mask((__m512i)mask);
        store(kept + found, (vf)_mm512_maskz_compress_ps(bits, (__m512)v));
        found += __builtin_popcount(bits);
#else
        for (int lane = 0; lane < kLanes; lane++) kept[found] = v[lane], found -= mask[lane];
#endif
    }
    store(kept + found, vf{});
    return in_lanes(found);
}

// The greatest t from low to 1 that a mass of `target` of the `values` reaches; low if there is less. Halves the range
// of t, and leaves in `values` those that are in it.
inline float nucleus_of(float* values, isize count, float low, double target) {
    float high = 1;
    while (low < high) {
        const float t = between(low, high);
        const double mass = mass_from(values, count, t);
        if (mass >= target) {
            low = t;
            count = keep(values, count, values, [=](vf v) { return v >= t; });
        } else {
            high = below(t);
            target -= mass;
            count = keep(values, count, values, [=](vf v) { return v < t; });
        }
    }
    return low;
}

struct Filter {
    isize top_k;  // 0: none
    float top_p, min_p;
};

// The least of the weights (the greatest of which is 1) that passes a filter with a top_k or a top_p.
// `count` is a multiple of kLanes; `room` is for count + kLanes numbers.
inline float limit_of(const Filter& f, const float* weights, isize count, float* room) {
    float low = f.min_p;  // less does not pass
    double mass = 0;
    if (f.top_k) {
        const isize groups = group_peaks(count, room, [=](isize i) { return load(weights + i); });
        low = fmaxf(low, kth_of(room, groups, f.top_k, 0, 1));
    } else {  // tokens of so little weight are together less than what top_p leaves out
        mass = mass_from(weights, count, low);
        low = fmaxf(low, float((1 - double(f.top_p)) * mass / double(2 * count)));
    }
    const isize kept = keep(weights, count, room, [=](vf v) { return v >= low; });
    if (f.top_k) {
        low = kth_of(room, kept, f.top_k, low, 1);
        mass = mass_from(room, kept, low);
    }
    if (f.top_p >= 1) return low;
    return nucleus_of(room, kept, low, mass * double(f.top_p));
}

// --- rows -----------------------------------------------------------------------------------------------------------

// `top` is the greatest of x / temperature, and finite.
template <class T>
int32_t draw_row(const T* x, isize cols, float temperature, float top, const uint32_t* key, const Filter& f) {
    const auto exponents = [=](isize i) { return load_row(x, i, cols) / temperature - top; };
    const auto weights = [=](isize i) { return vexp(exponents(i)); };
    const float least = fmaxf(f.min_p, 0x1p-36f);  // with less, not even the smallest E wins
    if (!f.top_k && f.top_p >= 1)
        return race(cols, key, least, weights, [=](isize i) { return exp_or_more(exponents(i)); });
    const isize count = in_lanes(cols);
    auto* known = (float*)scratch(Scratch::tile, (2 * count + kLanes) * sizeof(float));
    for (isize i = 0; i < count; i += kLanes) store(known + i, weights(i));
    const float limit = limit_of(f, known, count, known + count);
    const auto kept = [=](isize i) { return load(known + i); };
    return race(cols, key, fmaxf(limit, least), kept, kept);
}

template <class T>
void sample_row(const SampleArgs& a, isize row) {
    const auto bits = [&](Setting field) { return a.settings[isize(field) * a.rows + row]; };
    const auto number = [&](Setting field) {
        const int32_t of = bits(field);
        float value;
        std::memcpy(&value, &of, sizeof value);
        return value;
    };
    const T* x = (const T*)a.x + row * a.x_stride;
    const isize likeliest = argmax_row(x, a.cols);
    const float peak = widen(x[likeliest]), temperature = number(Setting::temperature), top = peak / temperature;
    const bool finite = std::fabs(peak) < INFINITY;
    int32_t token = finite ? int32_t(likeliest) : 0;
    if (finite && temperature > 0 && std::fabs(top) < INFINITY) {
        const uint32_t key[2] = {uint32_t(bits(Setting::key0)), uint32_t(bits(Setting::key1))};
        const Filter filter = {bits(Setting::top_k), number(Setting::top_p), number(Setting::min_p)};
        token = draw_row(x, a.cols, temperature, top, key, filter);
    }
    a.out[row] = token, a.out[a.rows + row] = finite;
}

template <class T>
void sample_of(const SampleArgs& a) {
    parallel(a.rows * a.cols >= 65536, a.rows, [&](isize row) { sample_row<T>(a, row); });
}

inline void sample(DType type, const SampleArgs& a) { type == DType::f32 ? sample_of<float>(a) : sample_of<bf16>(a); }

}  // namespace octavo::OCTAVO_ISA
