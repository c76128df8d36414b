// bias_act on CUDA: forward and derivatives read and write memory once, 16 bytes a thread and step; the bodies are in
// kernels.h, the launch is planned in bias_act.py.

#include "kernels.h"

namespace refine {

template <int A, int Order, class Number>
__global__ void __launch_bounds__(kPointThreads) point_kernel(const BiasActRecord record) {
    const Points<Number> points(record);
    const int64_t step = int64_t(gridDim.x) * kPointThreads;
    for (int64_t i = int64_t(blockIdx.x) * kPointThreads + threadIdx.x; i < points.packs(); i += step)
        point_pack<A, Order>(points, i);
}

template <int A, class Number>
__global__ void __launch_bounds__(kPointThreads) sum_kernel(const BiasActRecord record) {
    using Acc = typename AccOf<Number>::type;
    __shared__ Acc shared[kPointThreads];
    const Points<Number> points(record);
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

}  // namespace refine
