// The .cu sources on the host. The threads of a block are fibers that really wait for each other at __syncthreads(), and
// change places by longjmp, which costs no call of the system. A
// block whose threads do not all come to the same barrier ends the program, and so does a write behind shared memory,
// which is as large as the launch says and full of garbage before each block.
//
// FAKE_GRID=N: at most N blocks are launched, so that loops over the grid take several turns. FAKE_ORDER: 'backwards' or
// 'shuffled', the order in which threads run: with a barrier missing, results change.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
    unsigned x, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace on_host {

constexpr size_t kStack = 1 << 16, kGuard = 64;
constexpr unsigned char kGarbage = 0xA5;
enum class State { kWaiting, kDone };

struct Fiber {
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf place;
    State state;
    bool begun = false;
};

inline jmp_buf home;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // made once, they run one kernel after another
inline int current;
inline const std::function<void()>* body;
inline std::vector<unsigned char> shared;
constexpr int kUnknown = -1, kShortRecord = -2, kInvalidConfiguration = 9;

[[noreturn]] inline void die(const char* text) {
    std::fprintf(stderr, "kernel on the host: %s\n", text);
    std::abort();
}

inline const char* setting(const char* name) {
    const char* text = std::getenv(name);
    return text ? text : "";
}

inline double* shared_memory() {  // aligned to 16 bytes
    return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) / 16 * 16);
}

inline void leave(State state) {
    Fiber& fiber = *fibers[current];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(home, 1);
}

inline void entry() {
    for (;;) {
        (*body)();
        leave(State::kDone);
    }
}

inline State go_on(int index) {
    current = index;
    threadIdx = {unsigned(index)};
    Fiber& fiber = *fibers[index];
    if (_setjmp(home) == 0) {
        if (fiber.begun) _longjmp(fiber.place, 1);
        fiber.begun = true;
        setcontext(&fiber.start);
    }
    return fibers[current]->state;
}

inline void make_fibers(int count) {
    while (int(fibers.size()) < count) {
        Fiber& fiber = *fibers.emplace_back(std::make_unique<Fiber>());
        fiber.stack.resize(kStack);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, entry, 0);
    }
}

inline void run_block(int threads, size_t bytes, const std::function<void()>& kernel) {
    const std::string order_name = setting("FAKE_ORDER");
    static std::mt19937 rng(1);
    body = &kernel;
    shared.assign(bytes + 16 + kGuard, kGarbage);
    make_fibers(threads);
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) order[i] = order_name == "backwards" ? threads - 1 - i : i;
    for (int waiting = threads; waiting > 0;) {  // one turn brings all threads from one barrier to the next
        if (order_name == "shuffled") std::shuffle(order.begin(), order.end(), rng);
        waiting = 0;
        for (int i : order) waiting += go_on(i) == State::kWaiting;
        if (waiting && waiting != threads) die("not all threads of a block came to a barrier");
    }
    const unsigned char* behind = reinterpret_cast<unsigned char*>(shared_memory()) + bytes;
    for (size_t i = 0; i < kGuard - 16; ++i)
        if (behind[i] != kGarbage) die("a write behind shared memory");
}

template <class Record>
int launch(void (*kernel)(Record), unsigned blocks, int threads, size_t bytes, const void* packed, size_t length) {
    const int most = std::atoi(setting("FAKE_GRID"));
    if (length < sizeof(Record)) return kShortRecord;
    if (blocks == 0 || threads < 1 || threads > 1024 || bytes > 48 * 1024) return kInvalidConfiguration;
    Record record;
    std::memcpy(&record, packed, sizeof(Record));
    gridDim = {most > 0 ? std::min(blocks, unsigned(most)) : blocks};
    blockDim = {unsigned(threads)};
    const std::function<void()> once = [&] { kernel(record); };
    for (unsigned block = 0; block < gridDim.x; ++block) {
        blockIdx = {block};
        run_block(threads, bytes, once);
    }
    return 0;
}

}  // namespace on_host

#define __syncthreads() on_host::leave(on_host::State::kWaiting)
