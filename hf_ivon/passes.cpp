// The passes of hf_ivon/passes.py for CPUs, in vector instructions: the same numbers up to rounding.
//
// A processor's vector holds W floats. Every function takes several tensors at once: `count` of them, with their sizes
// and one array of addresses for each role. All are contiguous fp32, but for momenta, and weights whose means are kept
// apart, with their gradients: these may be bf16.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// From so many elements on a tensor does not stay in a cache from one pass to the next.
constexpr int64_t LARGE = 1 << 20;

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint64_t Wides __attribute__((vector_size(4 * W)));  // words of every second lane, with room above them
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

#ifdef IVON_COUNT_BYTES  // that passes have read and written: a test counts them, since they are what a pass costs
extern "C" {
int64_t ivon_bytes = 0;
}
#endif

namespace {

// ---------------------------------------------------------------------- vectors

template <class Vector, class Number>
Vector filled(Number number) {
    return Vector{} + number;
}

template <class Target, class Source>
Target bits(Source source) {
    static_assert(sizeof(Target) == sizeof(Source));
    Target target;
    std::memcpy(&target, &source, sizeof target);
    return target;
}

#ifdef IVON_COUNT_BYTES
void count(int64_t bytes) { ivon_bytes += bytes; }
#else
void count(int64_t) {}
#endif

// How many elements of a vector are meant: all, which the compiler knows, or the last ones of a tensor.
using All = std::integral_constant<int64_t, W>;

// Asks for what is read soon: a processor's own prefetching stops at the end of each page, of each of many streams.
void prefetch(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + 1024); }

template <class Number>
Floats load(const float* from, Number number) {
    Floats vector = filled<Floats>(1.0f);  // what is not loaded must not make exceptions
    prefetch(from);
    count(number * sizeof(float));
    std::memcpy(&vector, from, number * sizeof(float));
    return vector;
}

template <class Number>
void store(float* to, Floats vector, Number number) {
    count(number * sizeof(float));
    std::memcpy(to, &vector, number * sizeof(float));
}

template <class Number>
Floats load(const uint16_t* from, Number number) {
    Halves halves{};
    prefetch(from);
    count(number * sizeof(uint16_t));
    std::memcpy(&halves, from, number * sizeof(uint16_t));
    return bits<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// To the nearest bf16, to the even one of two, in the lower half of each word; NaN stays NaN.
Words rounded(Floats vector) {
    Words word = bits<Words>(vector);
    Words nearest = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    Words nan = bits<Words>(vector != vector);
    return (nearest & ~nan) | (nan & 0x7FC0);
}

template <class Number>
void store(uint16_t* to, Floats vector, Number number) {
    Halves halves = __builtin_convertvector(rounded(vector), Halves);
    count(number * sizeof(uint16_t));
    std::memcpy(to, &halves, number * sizeof(uint16_t));
}

// Past the caches, where it can be: the memory is not read first then. For what is not needed soon.
template <class Number>
void store_past(float* to, Floats vector, Number number) {
#if defined(__SSE2__)
    if (number == W && (uintptr_t)to % sizeof vector == 0) {
        count(sizeof vector);
#if defined(__AVX512F__)
        _mm512_stream_ps(to, (__m512)vector);
#elif defined(__AVX2__)
        _mm256_stream_ps(to, (__m256)vector);
#else
        _mm_stream_ps(to, (__m128)vector);
#endif
        return;
    }
#endif
    store(to, vector, number);
}

Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < W; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

Floats reciprocal_root(Floats x) {
#if defined(__AVX512F__)
    // An estimate of 14 bits and one step of Newton's method, which would make NaN of 0 and infinity.
    Floats y = (Floats)_mm512_rsqrt14_ps((__m512)x);
    Floats better = y + y * (0.5f - (0.5f * x * y) * y);
    return better != better ? y : better;
#else
    return 1.0f / square_root(x);
#endif
}

// The whole product of the lower halves.
Wides product_of_words(Wides a, Wides b) {
#if defined(__AVX512F__)
    return (Wides)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wides)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wides)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// The upper halves where the lower ones are.
Wides upper(Wides a) {
#if defined(__AVX512F__)
    return (Wides)_mm512_movehdup_ps((__m512)a);  // not on the port that shifts and products share
#else
    return a >> 32;
#endif
}

// ---------------------------------------------------------------------- noise, as in hf_ivon/philox.py

constexpr int ROUNDS = 7;

// What the noise of several tensors has in common.
struct Key {
    Wides first[ROUNDS], second[ROUNDS], c2, c3;

    explicit Key(const uint32_t* words) : c2(filled<Wides>((uint64_t)words[2])), c3(filled<Wides>((uint64_t)words[3])) {
        for (uint32_t i = 0; i < ROUNDS; i++) {
            first[i] = filled<Wides>((uint64_t)(uint32_t)(words[0] + i * 0x9E3779B9u));
            second[i] = filled<Wides>((uint64_t)(uint32_t)(words[1] + i * 0xBB67AE85u));
        }
    }
};

// Philox4x32 of W/2 counters; above their 32 bits the words hold whatever.
inline void philox(Wides c[4], const Key& key) {
    const Wides m0 = filled<Wides>((uint64_t)0xD2511F53), m1 = filled<Wides>((uint64_t)0xCD9E8D57);
    for (int i = 0; i < ROUNDS; i++) {
        Wides p0 = product_of_words(c[0], m0), p1 = product_of_words(c[2], m1);
        c[0] = upper(p1) ^ c[1] ^ key.first[i];
        c[1] = p1;
        c[2] = upper(p0) ^ c[3] ^ key.second[i];
        c[3] = p0;
    }
}

// Cephes' logf, for normal positive numbers.
inline Floats logarithm(Floats x) {
    Ints word = bits<Ints>(x);
    Ints exponent = (word - 0x3F3504F3) >> 23;  // of x / sqrt(1/2)
    Floats f = bits<Floats>(word - (exponent << 23)) - 1.0f, z = f * f, e = __builtin_convertvector(exponent, Floats);
    Floats p = 7.0376836292e-2f * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return f * z * p + e * -2.12194440e-4f - 0.5f * z + f + e * 0.693359375f;
}

inline Floats of_high_bits(Words words) { return __builtin_convertvector(bits<Ints>(words >> 8), Floats); }

inline void box_muller(Words first, Words second, Floats& x, Floats& y) {
    Floats radius = square_root(logarithm(of_high_bits(first) * 0x1p-24f + 0x1p-25f) * -2.0f);
    Floats quarter = (of_high_bits(second) - 8388607.5f) * 9.362675555e-8f;  // pi / 2**25
    Floats square = quarter * quarter;
    Floats sine = (square * -1.9515295891e-4f + 8.3321608736e-3f) * square - 1.6666654611e-1f;
    sine = (sine * square + 1.0f) * quarter;
    Floats cosine = (square * 2.443315711809948e-5f - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
    cosine = (cosine * square - 0.5f) * square + 1.0f;
    Floats half_sine = cosine * sine * 2.0f, half_cosine = 1.0f - sine * sine * 2.0f;
    x = (1.0f - half_sine * half_sine * 2.0f) * radius;
    y = half_cosine * half_sine * 2.0f * radius;
}

inline Words together(Wides even, Wides odd) { return bits<Words>((even & 0xFFFFFFFF) | (odd << 32)); }

// The four draws of each of W columns, of the tensor with this number.
__attribute__((always_inline)) inline void normals(uint64_t column, uint32_t index, const Key& key, Floats draws[4]) {
    static const uint64_t places[8] = {0, 2, 4, 6, 8, 10, 12, 14};
    Wides columns;
    std::memcpy(&columns, places, sizeof columns);
    columns += column;
    Wides even[4] = {columns, filled<Wides>((uint64_t)index), key.c2, key.c3};
    Wides odd[4] = {columns + 1, even[1], key.c2, key.c3};
    philox(even, key);
    philox(odd, key);
    box_muller(together(even[0], odd[0]), together(even[1], odd[1]), draws[0], draws[1]);
    box_muller(together(even[2], odd[2]), together(even[3], odd[3]), draws[2], draws[3]);
}

// ---------------------------------------------------------------------- threads

// Calls work(tensor, begin, end) for all of 0 <= begin < end <= length(tensor), each thread with its share of the sum.
template <class Length, class Work>
void share(int64_t count, int threads, Length length, Work work) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += length(i);
#pragma omp parallel num_threads(threads)
    {
        int64_t number = omp_get_num_threads(), mine = omp_get_thread_num();
        int64_t begin = total * mine / number / W * W, end = total * (mine + 1) / number / W * W;
        if (mine + 1 == number) end = total;
        for (int64_t i = 0, offset = 0; i < count && offset < end; offset += length(i), i++) {
            int64_t from = std::max<int64_t>(begin - offset, 0), to = std::min(end - offset, length(i));
            if (from < to) work(i, from, to);
        }
#if defined(__SSE2__)
        _mm_sfence();  // for `store_past`
#endif
    }
}

// Calls work(tensor, at, number) for each vector of each tensor.
template <class Work>
void share_vectors(int64_t count, int threads, const int64_t* sizes, Work work) {
    share(count, threads, [=](int64_t i) { return sizes[i]; }, [=](int64_t i, int64_t at, int64_t to) {
        for (; at + W <= to; at += W) work(i, at, All{});
        if (at < to) work(i, at, to - at);
    });
}

// Calls what prepare(tensor) returns with (at, draw, number) for each vector of each tensor: its place, and its noise,
// which is made for the four vectors of W columns together.
template <class Prepare>
void share_columns(int64_t count, int threads, const int64_t* sizes, const uint32_t* indices, const Key& key,
                   Prepare prepare) {
    auto length = [=](int64_t i) { return (sizes[i] + 3) / 4; };
    share(count, threads, length, [=, &key](int64_t i, int64_t from, int64_t to) {
        const int64_t size = sizes[i], width = length(i);
        const uint32_t index = indices[i];
        const auto work = prepare(i);
        for (int64_t column = from; column < to; column += W) {
            Floats draws[4];
            normals(column, index, key, draws);
            if (column + W <= to && 3 * width + column + W <= size)
                for (int lane = 0; lane < 4; lane++) work(lane * width + column, draws[lane], All{});
            else
                for (int lane = 0; lane < 4; lane++) {
                    int64_t at = lane * width + column, number = std::min({to - column, size - at, (int64_t)W});
                    if (number > 0) work(at, draws[lane], number);
                }
        }
    });
}

// The Hessian after a change by an estimate, Equation 4; positive whatever the change is.
Floats changed_hess(Floats hess, Floats change, float weight_decay) {
    return hess + (change / (hess + weight_decay) * 0.5f + 1.0f) * change;
}

// The least Hessian, as hf_ivon/functional.py has it: the variance stays finite.
float least_hess(float weight_decay) { return std::max(weight_decay * 0x1p-20f, 1e-30f) - weight_decay; }

}  // namespace

// ---------------------------------------------------------------------- the passes

namespace {

template <class Weight>
void sample(int64_t count, const int64_t* sizes, void* const* thetas, float* const* means, const float* const* hesses,
            const uint32_t* indices, const Key& key, float ess, float weight_decay, int keep, int threads) {
    share_columns(count, threads, sizes, indices, key, [=](int64_t i) {
        Weight* theta = static_cast<Weight*>(thetas[i]);
        float* kept = means[i];
        const float* hess = hesses[i];
        const bool large = sizes[i] >= LARGE;
        return [=](int64_t at, Floats draw, auto number) {
            Floats mean = keep ? load(theta + at, number) : load(kept + at, number);
            if (keep && large) store_past(kept + at, mean, number);
            if (keep && !large) store(kept + at, mean, number);
            Floats std = reciprocal_root((load(hess + at, number) + weight_decay) * ess);
            store(theta + at, mean + std * draw, number);
        };
    });
}

void subtract_noise(int64_t count, const int64_t* sizes, float* const* thetas, float* const* hesses,
                    const float* const* grads, const uint32_t* indices, const Key& key, float ess, float weight_decay,
                    float rate, float factor, int first, int threads) {
    const Floats floor = filled<Floats>(least_hess(weight_decay));
    share_columns(count, threads, sizes, indices, key, [=](int64_t i) {
        float *theta = thetas[i], *hesses_here = hesses[i];
        const float* grad = grads[i];
        return [=](int64_t at, Floats draw, auto number) {
            Floats hess = load(hesses_here + at, number), precision = (hess + weight_decay) * ess;
            Floats noise = reciprocal_root(precision) * draw;
            if (grad) {
                Floats estimate = noise * load(grad + at, number) * factor * precision;
                Floats change = (first ? estimate - hess : estimate) * rate;
                Floats learned = changed_hess(hess, change, weight_decay);
                learned = learned < floor ? floor : learned;
                store(hesses_here + at, learned - learned == 0.0f ? learned : hess, number);
            }
            store(theta + at, load(theta + at, number) - noise, number);
        };
    });
}

template <class Weight>
void adopt(int64_t count, const int64_t* sizes, void* const* thetas, float* const* means, int threads) {
    share_vectors(count, threads, sizes, [=](int64_t i, int64_t at, auto number) {
        Floats mean = load(means[i] + at, number), theta = load(static_cast<Weight*>(thetas[i]) + at, number);
        Floats kept = sizeof(Weight) == sizeof(float) ? mean : bits<Floats>(rounded(mean) << 16);
        Ints changed = kept != theta;
        int32_t any = 0;
        for (int lane = 0; lane < W; lane++) any |= changed[lane];
        if (any) store(means[i] + at, changed ? theta : mean, number);
    });
}

template <class Weight>
void add_product(int64_t count, const int64_t* sizes, float* const* totals, void* const* thetas,
                 const float* const* means, void* const* grads, float factor, int threads) {
    share_vectors(count, threads, sizes, [=](int64_t i, int64_t at, auto number) {
        if (!grads[i]) return;
        const Weight *theta = static_cast<Weight*>(thetas[i]), *grad = static_cast<Weight*>(grads[i]);
        Floats noise = load(theta + at, number) - load(means[i] + at, number);
        Floats product = noise * load(grad + at, number) * factor;
        store(totals[i] + at, load(totals[i] + at, number) + product, number);
    });
}

}  // namespace

extern "C" {

// Puts a weight sample into `thetas`. If `keep`, these hold the mean, which goes into `means`; else it is there.
void ivon_sample(int64_t count, const int64_t* sizes, void* const* thetas, float* const* means,
                 const float* const* hesses, const uint32_t* indices, const uint32_t* words, float ess,
                 float weight_decay, int keep, int narrow, int threads) {
    const Key key(words);
    auto run = narrow ? sample<uint16_t> : sample<float>;
    run(count, sizes, thetas, means, hesses, indices, key, ess, weight_decay, keep, threads);
}

// Puts `means` back into `thetas`, and leaves gradient times noise, or the squared gradient, where they were; zeros
// where there is no gradient.
void ivon_take_product(int64_t count, const int64_t* sizes, float* const* thetas, float* const* means,
                       const float* const* grads, float factor, int squared, int threads) {
    share_vectors(count, threads, sizes, [=](int64_t i, int64_t at, auto number) {
        Floats mean = load(means[i] + at, number), product{};
        if (grads[i]) {
            Floats grad = load(grads[i] + at, number), scaled = grad * factor;
            product = squared ? scaled * scaled : (load(thetas[i] + at, number) - mean) * grad * factor;
        }
        store(thetas[i] + at, mean, number);
        store(means[i] + at, product, number);
    });
}

// Takes the noise off `thetas`, drawn again, and where there is a gradient lets `hesses` learn from it times the noise.
void ivon_subtract_noise(int64_t count, const int64_t* sizes, float* const* thetas, float* const* hesses,
                         const float* const* grads, const uint32_t* indices, const uint32_t* words, float ess,
                         float weight_decay, float rate, float factor, int first, int threads) {
    const Key key(words);
    subtract_noise(count, sizes, thetas, hesses, grads, indices, key, ess, weight_decay, rate, factor, first, threads);
}

// Lets `means` follow what was written to `thetas`, which hold them otherwise, rounded.
void ivon_adopt(int64_t count, const int64_t* sizes, void* const* thetas, float* const* means, int narrow,
                int threads) {
    auto run = narrow ? adopt<uint16_t> : adopt<float>;
    run(count, sizes, thetas, means, threads);
}

// Adds gradient times noise to `totals`, where there is a gradient.
void ivon_add_product(int64_t count, const int64_t* sizes, float* const* totals, void* const* thetas,
                      const float* const* means, void* const* grads, float factor, int narrow, int threads) {
    auto run = narrow ? add_product<uint16_t> : add_product<float>;
    run(count, sizes, totals, thetas, means, grads, factor, threads);
}

// Puts the squares of the gradients into `totals`, or adds them to what is there; nothing without a gradient.
void ivon_square(int64_t count, const int64_t* sizes, float* const* totals, const float* const* grads, float factor,
                 int keep, int threads) {
    share_vectors(count, threads, sizes, [=](int64_t i, int64_t at, auto number) {
        if (!grads[i]) return;
        Floats scaled = load(grads[i] + at, number) * factor, square = scaled * scaled;
        store(totals[i] + at, keep ? load(totals[i] + at, number) + square : square, number);
    });
}

// The options of a step, as hf_ivon/passes.py has them, with reciprocals in place of divisors.
struct Options {
    float ess, weight_decay, rate1, rate2, inverse_debias, clip_radius, lr, inverse_divisor;
    int32_t price, average;
};

}  // extern "C"

namespace {

template <class Momentum, class Gradient>
void update(int64_t count, const int64_t* sizes, float* const* means, void* const* grads,
            const float* const* curvatures, void* const* momenta, float* const* hesses, const float* const* priors,
            const Options o, int threads) {
    const float delta = o.weight_decay;
    const Floats floor = filled<Floats>(o.average ? 1e-30f : least_hess(delta));
    const Floats most = filled<Floats>(o.clip_radius), least = -most;
    share_vectors(count, threads, sizes, [=](int64_t i, int64_t at, auto number) {
        Momentum* momenta_here = static_cast<Momentum*>(momenta[i]);
        const Gradient* grads_here = static_cast<Gradient*>(grads[i]);
        Floats mean = load(means[i] + at, number), hess = load(hesses[i] + at, number);
        Floats momentum = load(momenta_here + at, number);
        momentum += (load(grads_here + at, number) - momentum) * o.rate1;
        store(momenta_here + at, momentum, number);
        if (curvatures) {
            Floats estimate = load(curvatures[i] + at, number) * o.inverse_divisor;
            if (o.price) estimate *= (hess + delta) * o.ess;
            Floats change = (estimate - hess) * o.rate2;
            hess = o.average ? hess + change : changed_hess(hess, change, delta);
            hess = hess < floor ? floor : hess;  // of a comparison with NaN the other side is taken, which is NaN
            store(hesses[i] + at, hess, number);
        }
        Floats displacement = priors ? mean - load(priors[i] + at, number) : mean;
        Floats direction = (momentum * o.inverse_debias + displacement * delta) / (hess + delta);
        direction = direction < least ? least : direction;
        direction = direction > most ? most : direction;
        store(means[i] + at, mean - direction * o.lr, number);
    });
}

}  // namespace

extern "C" {

// Runs lines 3 to 7 of Algorithm 1. `priors` may be null: zeros. So may `curvatures`: `hesses` stay as they are.
void ivon_update(int64_t count, const int64_t* sizes, float* const* means, void* const* grads,
                 const float* const* curvatures, void* const* momenta, float* const* hesses,
                 const float* const* priors, const Options* options, int narrow_momentum, int narrow_grad,
                 int threads) {
    auto wide = narrow_grad ? update<float, uint16_t> : update<float, float>;
    auto run = narrow_momentum ? narrow_grad ? update<uint16_t, uint16_t> : update<uint16_t, float> : wide;
    run(count, sizes, means, grads, curvatures, momenta, hesses, priors, *options, threads);
}

}  // extern "C"
