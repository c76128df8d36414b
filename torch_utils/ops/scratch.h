// Scratch memory of a call.

#pragma once

#include <memory>
#include <new>
#include <utility>

#include "kernels.h"

namespace refine {

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory that a thread keeps from call to call, up to a limit: to fetch megabytes anew from the system each time would
// take a tenth of a convolution.
struct Arena {
    static constexpr int64_t kLimit = (96 << 20) / sizeof(float);

    std::unique_ptr<float[]> memory;
    int64_t numbers = 0, used = 0, wanted = 0, buffers = 0;

    // Null where there is no room left; when all buffers are gone there will be.
    float* take(int64_t count) {
        ++buffers;
        wanted += count;
        if (used + count > numbers) return nullptr;
        used += count;
        return memory.get() + used - count;
    }
    void give_back() {
        if (--buffers > 0) return;
        if (wanted > numbers && wanted <= kLimit) {
            memory.reset();
            memory.reset(new (std::nothrow) float[wanted]);
            numbers = memory ? wanted : 0;
        }
        used = wanted = 0;
    }
};

inline thread_local Arena arena;

// Numbers that are not set, from a line of cache on. A vector may reach beyond the last.
class Buffer {
public:
    explicit Buffer(int64_t numbers) {
        const int64_t count = round_up(numbers, 16) + 32;
        float* start = arena.take(count);
        try {
            if (!start) own_.reset(start = new float[count]);
        } catch (...) {
            arena.give_back();
            throw;
        }
        data_ = start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64 / sizeof(float);
    }
    ~Buffer() {
        if (data_) arena.give_back();
    }
    Buffer(Buffer&& other) noexcept : own_(std::move(other.own_)), data_(other.data_) { other.data_ = nullptr; }
    float* data() const { return data_; }

private:
    std::unique_ptr<float[]> own_;
    float* data_;
};

}  // namespace refine
