// upfirdn2d on CUDA: tiles in shared memory; the bodies are in kernels.h, the launch is planned in upfirdn2d.py.

#include "kernels.h"

namespace refine {

template <int Up, int Down, int Taps, class Number>
__global__ void __launch_bounds__(kTileThreads) tile_kernel(const TilesRecord record) {
    using Acc = typename AccOf<Number>::type;
    extern __shared__ double shared_bytes[];  // double: aligned for every Acc
    Acc* shared = reinterpret_cast<Acc*>(shared_bytes);
    const Tiles<Up, Down, Taps> tiles(record);
    for (int64_t block = blockIdx.x; block < tiles.blocks(); block += gridDim.x) {
        tile_load(tiles, block, threadIdx.x, kTileThreads, reinterpret_cast<const Number*>(record.x),
                  reinterpret_cast<const Acc*>(record.f), Acc(record.gain), shared);
        __syncthreads();
        tile_filter(tiles, block, threadIdx.x, kTileThreads, shared, reinterpret_cast<Number*>(record.y));
        __syncthreads();
    }
}

template <class Number>
__global__ void __launch_bounds__(kTileThreads) direct_kernel(const Upfirdn2dRecord record) {
    using Acc = typename AccOf<Number>::type;
    const int64_t outputs = record.n * record.c * record.out_h * record.out_w, step = int64_t(gridDim.x) * kTileThreads;
    for (int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x; i < outputs; i += step)
        direct_output(record, i, reinterpret_cast<const Number*>(record.x), reinterpret_cast<const Acc*>(record.f),
                      reinterpret_cast<Number*>(record.y));
}

}  // namespace refine
