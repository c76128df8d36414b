// filtered_lrelu on CUDA: the bodies are in filtered_lrelu.h, the launch is planned in filtered_lrelu.py.

#include "filtered_lrelu.h"

namespace refine {

template <int Up, int Down, class Number>
__global__ void __launch_bounds__(kLreluThreads) lrelu_kernel(const FilteredLreluTilesRecord record) {
    extern __shared__ double shared_bytes[];  // double: aligned for every Acc
    const int64_t blocks = record.n * record.c * record.tiles_y * record.tiles_x;
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const LreluTile<Up, Down, Number> tile(record, block,
                                               reinterpret_cast<typename AccOf<Number>::type*>(shared_bytes));
        tile.load_all(threadIdx.x);
        __syncthreads();
        tile.enlarge_rows(threadIdx.x);
        __syncthreads();
        tile.apply_slopes(threadIdx.x);
        __syncthreads();
        tile.shrink_rows(threadIdx.x);
        __syncthreads();
        tile.store_outputs(threadIdx.x);
        __syncthreads();
    }
}

}  // namespace refine
