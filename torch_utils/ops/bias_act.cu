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

// What follows a modulated convolution: y = clamp(act(x · d + noise · strength + b) · gain, −clamp, +clamp), and of it
// y · then + beside, or both y and y · then; or dx and the sums that make the other gradients (modulated_act.py).
struct ModulatedActRecord {
    int64_t x, d, noise, strength, b, then, beside;  // addresses; null where not used. d, then: Number (n, c)
    int64_t dy, scaled, out;                         // noise, strength: Acc; scaled: the second result or its gradient
    int64_t sums;  // Acc (4, n, c): of dz · x, dz, dz · noise, the slope · what is multiplied with `then`
    int64_t act, channels_last;
    int64_t wide;  // out and beside, or dy, are Acc
    int64_t n, c, area;
    int64_t noise_step;  // from one image's noise to the next one's
    double alpha, gain, clamp;
};

template <int Order, class Acc>
REFINE_FN Acc chosen(int64_t act, bool clamped, Acc z, Acc dy, const Epilogue<Acc>& e) {
    return chosen_element<Order>(act, clamped, z, dy, Acc(0), e);
}

template <class Number, class Acc>
REFINE_FN Acc load_at(int64_t address, bool wide, int64_t i) {
    return wide ? reinterpret_cast<const Acc*>(address)[i] : Acc(load(reinterpret_cast<const Number*>(address)[i]));
}

// A block has 8 planes, 32 threads along each; or 32 neighbouring channels, 8 threads along the pixels.
template <int Order, class Number>
__global__ void __launch_bounds__(kPointThreads) modulated_kernel(const ModulatedActRecord record) {
    using Acc = typename AccOf<Number>::type;
    __shared__ Acc shared[4 * kPointThreads];
    const auto *x = reinterpret_cast<const Number*>(record.x), *d = reinterpret_cast<const Number*>(record.d);
    const auto *b = reinterpret_cast<const Number*>(record.b), *then = reinterpret_cast<const Number*>(record.then);
    auto* scaled = reinterpret_cast<Number*>(record.scaled);
    const auto* noise = reinterpret_cast<const Acc*>(record.noise);
    auto* out = reinterpret_cast<Number*>(record.out);
    auto* sums = reinterpret_cast<Acc*>(record.sums);
    const Acc strength = noise ? *reinterpret_cast<const Acc*>(record.strength) : Acc(0);
    const Epilogue<Acc> epilogue = {Acc(record.alpha), Acc(record.gain), Acc(record.clamp)};
    const bool last = record.channels_last != 0, clamped = record.clamp >= 0, wide = record.wide != 0;
    const int thread = int(threadIdx.x), lanes = last ? 8 : 32, columns = kPointThreads / lanes;
    const int lane = last ? thread / columns : thread % lanes, column = last ? thread % columns : thread / lanes;
    const int64_t n = record.n, c = record.c, area = record.area, tiles = ceil_div(c, columns);
    for (int64_t block = blockIdx.x; block < n * tiles; block += gridDim.x) {
        const int64_t image = block / tiles, channel = block % tiles * columns + column;
        const int64_t first = last ? image * area * c + channel : (image * c + channel) * area, step = last ? c : 1;
        Acc sum_x = Acc(0), sum = Acc(0), sum_noise = Acc(0), sum_then = Acc(0);
        if (channel < c) {
            const Acc scale = d ? Acc(load(d[image * c + channel])) : Acc(1), bias = b ? Acc(load(b[channel])) : Acc(0);
            const Acc after = then ? Acc(load(then[image * c + channel])) : Acc(1);
            for (int64_t pixel = lane; pixel < area; pixel += lanes) {
                const int64_t i = first + pixel * step;
                const Acc from = Acc(load(x[i])), added = noise ? noise[image * record.noise_step + pixel] : Acc(0);
                const Acc z = from * scale + added * strength + bias;
                const Acc y = Order == 0 || then ? chosen<0>(record.act, clamped, z, Acc(0), epilogue) : Acc(0);
                if (Order == 0) {
                    const Acc added_up = record.beside ? load_at<Number, Acc>(record.beside, wide, i) : Acc(0);
                    const Acc value = scaled ? y : y * after + added_up;
                    if (scaled) store(&scaled[i], y * after);
                    if (wide)
                        reinterpret_cast<Acc*>(record.out)[i] = value;
                    else
                        store(&out[i], value);
                    continue;
                }
                const Acc slope = load_at<Number, Acc>(record.dy, wide, i);
                const Acc of_scaled = scaled ? Acc(load(scaled[i])) : slope;
                const Acc slope_of_y = scaled ? slope + of_scaled * after : slope * after;
                const Acc value = chosen<1>(record.act, clamped, z, slope_of_y, epilogue);
                store(&out[i], value * scale);
                sum_then += of_scaled * y;
                sum_x += value * from;
                sum += value;
                sum_noise += value * added;
            }
        }
        if (Order == 0) continue;
        shared[thread] = sum_x;
        shared[kPointThreads + thread] = sum;
        shared[2 * kPointThreads + thread] = sum_noise;
        shared[3 * kPointThreads + thread] = sum_then;
        for (int half = lanes / 2; half > 0; half /= 2) {
            __syncthreads();
            const int other = thread + half * (last ? columns : 1);
            if (lane >= half) continue;
            for (int k = 0; k < 4 * kPointThreads; k += kPointThreads) shared[k + thread] += shared[k + other];
        }
        __syncthreads();
        if (lane == 0 && channel < c)
            for (int k = 0; k < 4; ++k) sums[(k * n + image) * c + channel] = shared[k * kPointThreads + thread];
        __syncthreads();
    }
}

}  // namespace refine
