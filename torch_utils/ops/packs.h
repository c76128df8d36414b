// Some numbers that lie side by side in memory, read and written by a thread of a CUDA kernel at once.

#pragma once

#include "kernels.h"

#ifdef __CUDACC__
#define REFINE_DEVICE __device__ __forceinline__
#define REFINE_UNROLL _Pragma("unroll")
#else
#define REFINE_DEVICE inline
#define REFINE_UNROLL
#endif

namespace refine {

// Halves lie in pairs in 32 bits, in registers, too.
template <class Number, int Count, bool Pairs = sizeof(Number) == 2 && Count % 2 == 0>
struct alignas(sizeof(Number) * Count) Pack {
    Number numbers[Count];

    REFINE_DEVICE auto at(int i) const { return load(numbers[i]); }

    template <class Acc>
    REFINE_DEVICE void set(const Acc (&values)[Count]) {
        REFINE_UNROLL
        for (int i = 0; i < Count; ++i) store(&numbers[i], values[i]);
    }
};

REFINE_DEVICE float first_of(BFloat16, uint32_t pair) { return from_bits(pair << 16); }
REFINE_DEVICE float second_of(BFloat16, uint32_t pair) { return from_bits(pair & 0xffff0000u); }

#ifdef __CUDA_ARCH__
REFINE_DEVICE float first_of(Float16, uint32_t pair) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
    return value;
}

REFINE_DEVICE float second_of(Float16, uint32_t pair) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(pair));
    return value;
}
#else
inline float first_of(Float16, uint32_t pair) { return load(Float16{uint16_t(pair)}); }
inline float second_of(Float16, uint32_t pair) { return load(Float16{uint16_t(pair >> 16)}); }
#endif

template <class Number>
REFINE_DEVICE uint32_t pair_of(Number, float first, float second) {
    Number numbers[2];
    store(&numbers[0], first);
    store(&numbers[1], second);
    return numbers[0].bits | uint32_t(numbers[1].bits) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction, rounded as by store()
REFINE_DEVICE uint32_t pair_of(BFloat16, float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

REFINE_DEVICE uint32_t pair_of(Float16, float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif

template <class Number, int Count>
struct alignas(sizeof(Number) * Count) Pack<Number, Count, true> {
    uint32_t pairs[Count / 2];

    REFINE_DEVICE float at(int i) const {
        return i % 2 ? second_of(Number(), pairs[i / 2]) : first_of(Number(), pairs[i / 2]);
    }

    REFINE_DEVICE void set(const float (&values)[Count]) {
        REFINE_UNROLL
        for (int i = 0; i < Count / 2; ++i) pairs[i] = pair_of(Number(), values[2 * i], values[2 * i + 1]);
    }
};

template <class Number, int Count>
REFINE_DEVICE Pack<Number, Count> load_pack(const Number* from) {
    return *reinterpret_cast<const Pack<Number, Count>*>(from);
}

template <class Number, int Count, class Acc>
REFINE_DEVICE void store_pack(Number* to, const Acc (&values)[Count]) {
    Pack<Number, Count> pack;
    pack.set(values);
    *reinterpret_cast<Pack<Number, Count>*>(to) = pack;
}

}  // namespace refine
