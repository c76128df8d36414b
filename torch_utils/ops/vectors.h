// Whole vectors of 32 bytes, as GCC and Clang know them on every processor; wider than a register they take two.

#pragma once

#include "kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace refine {

template <class Acc>
struct VecOf {
    typedef Acc type __attribute__((vector_size(32)));
    typedef int64_t bits __attribute__((vector_size(32)));
};
template <class Acc>
using Vec = typename VecOf<Acc>::type;
template <class Acc>
constexpr int kLanes = 32 / sizeof(Acc);

// Number → Acc, a vector of them. No alignment is asked for.
template <class Number, class Acc = typename AccOf<Number>::type>
inline Vec<Acc> load_vec(const Number* from) {
    Vec<Acc> v;
    if constexpr (sizeof(Number) == sizeof(Acc)) {
        memcpy(&v, from, sizeof(v));
    } else {
        Acc values[kLanes<Acc>];
        for (int i = 0; i < kLanes<Acc>; ++i) values[i] = load(from[i]);
        memcpy(&v, values, sizeof(v));
    }
    return v;
}

template <class Number, class Acc>
inline void store_vec(Number* to, const Vec<Acc>& v) {
    if constexpr (sizeof(Number) == sizeof(Acc)) {
        memcpy(to, &v, sizeof(v));
    } else {
        Acc values[kLanes<Acc>];
        memcpy(values, &v, sizeof(v));
        for (int i = 0; i < kLanes<Acc>; ++i) store(&to[i], values[i]);
    }
}

// Loops over 16-bit numbers would not become vectors.
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

template <>
inline Vec<float> load_vec<BFloat16, float>(const BFloat16* from) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    return Vec<float>(__builtin_convertvector(halves, Words) << 16);
}

template <>
inline void store_vec<BFloat16, float>(BFloat16* to, const Vec<float>& v) {  // as store() in kernels.h
    const Words bits = Words(v), nan = Words(v != v);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves halves = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Halves);
    memcpy(to, &halves, sizeof(halves));
}

#ifdef __F16C__
template <>
inline Vec<float> load_vec<Float16, float>(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <>
inline void store_vec<Float16, float>(Float16* to, const Vec<float>& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Any count of them, side by side.
template <class Number, class Acc>
inline void load_many(const Number* from, Acc* __restrict__ to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store_vec<Acc, Acc>(to + i, load_vec(from + i));
    for (; i < count; ++i) to[i] = load(from[i]);
}

template <class Number, class Acc>
inline void store_many(const Acc* from, Number* __restrict__ to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store_vec<Number, Acc>(to + i, load_vec(from + i));
    for (; i < count; ++i) store(&to[i], from[i]);
}

// The first `count` ≥ 0 lanes, zeros for the rest: whatever stands there, NaN included, is gone.
template <class Acc>
inline Vec<Acc> first_lanes(const Vec<Acc>& v, int64_t count) {
    using Bits = typename VecOf<Acc>::bits;
    static constexpr int64_t ones[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
    Bits mask;
    memcpy(&mask, reinterpret_cast<const char*>(ones) + 32 - at_most(count, kLanes<Acc>) * sizeof(Acc), sizeof(mask));
    return Vec<Acc>(Bits(v) & mask);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define REFINE_SHUFFLES
#endif
#endif

// a0 a1 … b0 b1 … → the even numbers of both, or the odd ones.
template <int Odd, class Acc>
inline Vec<Acc> every_second(const Vec<Acc>& a, const Vec<Acc>& b) {
#ifdef REFINE_SHUFFLES
    if constexpr (sizeof(Acc) == 4)
        return __builtin_shufflevector(a, b, Odd, 2 + Odd, 4 + Odd, 6 + Odd, 8 + Odd, 10 + Odd, 12 + Odd, 14 + Odd);
    else
        return __builtin_shufflevector(a, b, Odd, 2 + Odd, 4 + Odd, 6 + Odd);
#else
    constexpr int half = kLanes<Acc> / 2;
    Vec<Acc> v;
    for (int i = 0; i < half; ++i) v[i] = a[2 * i + Odd], v[half + i] = b[2 * i + Odd];
    return v;
#endif
}

// a0 b0 a1 b1 …: the lower half of that, or the upper.
template <int Upper, class Acc>
inline Vec<Acc> interleave(const Vec<Acc>& a, const Vec<Acc>& b) {
    constexpr int first = Upper ? kLanes<Acc> / 2 : 0;
#ifdef REFINE_SHUFFLES
    if constexpr (sizeof(Acc) == 4)
        return __builtin_shufflevector(a, b, first, 8 + first, first + 1, 9 + first, first + 2, 10 + first, first + 3,
                                       11 + first);
    else
        return __builtin_shufflevector(a, b, first, 4 + first, first + 1, 5 + first);
#else
    Vec<Acc> v;
    for (int i = 0; i < kLanes<Acc> / 2; ++i) v[2 * i] = a[first + i], v[2 * i + 1] = b[first + i];
    return v;
#endif
}

}  // namespace refine
