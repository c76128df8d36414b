// bias_act on CUDA: forward and derivatives read and write memory once, 16 bytes a thread and step; the bodies are in
// kernels.h. Launches on the caller's stream and does nothing else there, so it can be captured into a graph.

#include "kernels.h"

namespace refine {
namespace {

template <int A, int Order, class Number>
__global__ void __launch_bounds__(kPointThreads) point_kernel(const Points<Number> points) {
    const int64_t step = int64_t(gridDim.x) * kPointThreads;
    for (int64_t i = int64_t(blockIdx.x) * kPointThreads + threadIdx.x; i < points.packs(); i += step)
        point_pack<A, Order>(points, i);
}

template <int A, class Number>
__global__ void __launch_bounds__(kPointThreads) sum_kernel(const Points<Number> points) {
    using Acc = typename AccOf<Number>::type;
    __shared__ Acc shared[kPointThreads];
    for (int64_t block = blockIdx.x; block < points.sum_blocks(); block += gridDim.x) {
        shared[threadIdx.x] = sum_points<A>(points, block, threadIdx.x);
        for (int half = points.sum_lanes() / 2; half > 0; half /= 2) {
            __syncthreads();
            sum_halves(points, threadIdx.x, half, shared);
        }
        __syncthreads();
        sum_store(points, block, threadIdx.x, shared);
        __syncthreads();
    }
}

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

template <int A, class Number>
int launch(const BiasActCall& call) {
    const Points<Number> points(call);
    const auto stream = reinterpret_cast<cudaStream_t>(call.stream);
    if (call.order == 1 && call.partial) {
        sum_kernel<A><<<unsigned(at_most(points.sum_blocks(), kMostBlocks)), kPointThreads, 0, stream>>>(points);
        return int(cudaGetLastError());
    }
    const unsigned blocks = unsigned(at_most(ceil_div(points.packs(), kPointThreads), kMostBlocks));
    if (call.order == 0) point_kernel<A, 0><<<blocks, kPointThreads, 0, stream>>>(points);
    if (call.order == 1) point_kernel<A, 1><<<blocks, kPointThreads, 0, stream>>>(points);
    if (call.order == 2) point_kernel<A, 2><<<blocks, kPointThreads, 0, stream>>>(points);
    return int(cudaGetLastError());
}

template <class Number>
int run(const BiasActCall& call) {
    if (call.act < 0 || call.act >= kActivations) return kBadActivation;
    return call.act == kLrelu ? launch<kLrelu, Number>(call) : launch<kAnyActivation, Number>(call);
}

}  // namespace
}  // namespace refine

extern "C" int refine_bias_act(const void* packed) {
    using namespace refine;
    BiasActCall call;
    memcpy(&call, packed, sizeof(call));
    if (call.outer * call.channels * call.inner == 0) return kOk;
    switch (call.dtype) {
        case kFloat32: return run<float>(call);
        case kFloat64: return run<double>(call);
        case kFloat16: return run<Float16>(call);
        case kBFloat16: return run<BFloat16>(call);
    }
    return kBadDType;
}
