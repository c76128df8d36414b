// upfirdn2d on CUDA: tiles in shared memory, the bodies in kernels.h. Launches on the caller's stream and does nothing
// else there (no allocation, no synchronisation), so it can be captured into a graph.

#include "kernels.h"

namespace refine {
namespace {

template <int Up, int Down, int Taps, class Number, class Acc>
__global__ void __launch_bounds__(kTileThreads)
    tile_kernel(const Tiles<Up, Down, Taps> tiles, const Number* x, const Acc* f, Acc gain, Number* y) {
    extern __shared__ double shared_bytes[];  // double: aligned for every Acc
    Acc* shared = reinterpret_cast<Acc*>(shared_bytes);
    for (int64_t block = blockIdx.x; block < tiles.blocks(); block += gridDim.x) {
        tile_load(tiles, block, threadIdx.x, kTileThreads, x, f, gain, shared);
        __syncthreads();
        tile_filter(tiles, block, threadIdx.x, kTileThreads, shared, y);
        __syncthreads();
    }
}

template <class Number, class Acc>
__global__ void __launch_bounds__(kTileThreads)
    direct_kernel(const Upfirdn2dCall call, int64_t outputs, const Number* x, const Acc* f, Number* y) {
    const int64_t step = int64_t(gridDim.x) * kTileThreads;
    for (int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x; i < outputs; i += step)
        direct_output(call, i, x, f, y);
}

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

template <class Number>
int run_direct(const Upfirdn2dCall& call) {
    using Acc = typename AccOf<Number>::type;
    const int64_t outputs = call.n * call.c * call.out_h * call.out_w;
    const int64_t blocks = at_most(ceil_div(outputs, kTileThreads), kMostBlocks);
    direct_kernel<<<unsigned(blocks), kTileThreads, 0, reinterpret_cast<cudaStream_t>(call.stream)>>>(
        call, outputs, reinterpret_cast<const Number*>(call.x), reinterpret_cast<const Acc*>(call.f),
        reinterpret_cast<Number*>(call.y));
    return int(cudaGetLastError());
}

template <int Up, int Down, int Taps, class Number>
int run_tiles(const Upfirdn2dCall& call) {
    using Acc = typename AccOf<Number>::type;
    Tiles<Up, Down, Taps> tiles;
    if (!plan_tiles(call, sizeof(Acc), &tiles)) return run_direct<Number>(call);
    const int64_t blocks = at_most(tiles.blocks(), kMostBlocks);
    const size_t shared = size_t(tiles.shared_numbers()) * sizeof(Acc);
    tile_kernel<<<unsigned(blocks), kTileThreads, shared, reinterpret_cast<cudaStream_t>(call.stream)>>>(
        tiles, reinterpret_cast<const Number*>(call.x), reinterpret_cast<const Acc*>(call.f), Acc(call.gain),
        reinterpret_cast<Number*>(call.y));
    return int(cudaGetLastError());
}

template <class Number>
int run(const Upfirdn2dCall& call) {
    const bool square = call.upx == call.upy && call.downx == call.downy;
    if (square && call.fw == 4 && call.fh == 4) {
        if (call.upx == 1 && call.downx == 1) return run_tiles<1, 1, 4, Number>(call);
        if (call.upx == 2 && call.downx == 1) return run_tiles<2, 1, 4, Number>(call);
        if (call.upx == 1 && call.downx == 2) return run_tiles<1, 2, 4, Number>(call);
    }
    return run_tiles<0, 0, 0, Number>(call);
}

}  // namespace
}  // namespace refine

extern "C" int refine_upfirdn2d(const void* packed) {
    using namespace refine;
    Upfirdn2dCall call;
    memcpy(&call, packed, sizeof(call));
    if (call.n * call.c * call.out_h * call.out_w == 0) return kOk;
    switch (call.dtype) {
        case kFloat32: return run<float>(call);
        case kFloat64: return run<double>(call);
        case kFloat16: return run<Float16>(call);
        case kBFloat16: return run<BFloat16>(call);
    }
    return kBadDType;
}
