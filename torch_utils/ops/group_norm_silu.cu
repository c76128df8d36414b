// Group normalisation, scale, shift and silu on CUDA, forward and backward, in float for float, half and bfloat16.
//
//     y = silu(z),   z = (x̂ · weight + bias) · (scale + 1) + shift,   x̂ = (x + before − mean) · rstd
//
// A block takes some groups of an image with all their pixels. A thread stays with one channel of planes, or with a pack
// of neighbouring channels of pixels, and keeps its first packs in registers: the rest is read twice. It counts from the
// channel's first number, the pilot: d = x − pilot is of the size of the deviation, so that nothing cancels. Sums have
// one order, and no other block takes part in them, so that the bits are always the same.
//
// x may be a sum that is made on the way: where `total` is given, its first `own` channels are (x + y) · factor, rounded,
// and the others are those of `beside`. The gradient of total beside that by the norm, dtotal, is then added to dx.

#include "packs.h"

namespace refine {

// One call, as group_norm_silu.py packs it: eight bytes a field. weight and bias are (c,), float or Number; before, scale
// and shift are (n, c) or null, with so many numbers from row to row; their gradients are dense.
struct GroupNormSiluRecord {
    int64_t x, out, dy;  // out: y, or dx in the backward pass
    int64_t stats;       // double (n, groups, 2): mean and 1/√(variance + eps); the forward pass writes them
    int64_t weight, bias, before, scale, shift;
    int64_t before_step, scale_step, shift_step;
    int64_t d_before, d_scale, d_shift, shares;  // shares: float (2, n, c), which summed over n are d_weight and d_bias
    int64_t n, c, area, per_group;
    int64_t channels, lanes;  // of a block; threads that share a channel or a pack of channels
    int64_t float_weights, silu;
    double eps;
    int64_t y, beside, total, dtotal, d_beside, own;  // all of them may be null; own = c without `beside`
    double factor;
};

// Where a channel of a sum comes from: of x, to which y is added, or of `beside`.
template <class Number, bool Last>
struct Source {
    const Number *x, *y;
    float factor;
    bool own;
    int64_t channels, start;  // channels of x or of beside; the first number of the channel there
    int step = 0;

    REFINE_DEVICE Source(const GroupNormSiluRecord& r, int image, int channel) : own(channel < r.own) {
        x = reinterpret_cast<const Number*>(own ? r.x : r.beside);
        y = reinterpret_cast<const Number*>(own ? r.y : 0);
        factor = float(r.factor);
        channels = own ? r.own : r.c - r.own;
        const int64_t place = own ? channel : channel - r.own;
        start = Last ? image * r.area * channels + place : (image * channels + place) * r.area;
    }

    template <int Count>
    REFINE_DEVICE Pack<Number, Count> read(int k) const {
        const int64_t i = start + int64_t(k) * step;
        auto pack = load_pack<Number, Count>(x + i);
        if (!y) return pack;
        const auto other = load_pack<Number, Count>(y + i);
        decltype(pack.at(0)) sums[Count];
        REFINE_UNROLL
        for (int w = 0; w < Count; ++w) sums[w] = (pack.at(w) + other.at(w)) * factor;
        pack.set(sums);
        return pack;
    }
};

// A block's part of the image, and a thread's part of that.
template <class Number, bool Last, bool Wide>
struct Part {
    static constexpr int kCount = Wide ? 16 / sizeof(Number) : 1;  // numbers of a pack
    static constexpr int kWidth = Last ? kCount : 1;               // channels of a pack

    const GroupNormSiluRecord& r;
    int thread, threads, channels, lanes, columns;
    int image, first, groups;  // first channel of the block, groups of the block
    int lane, column, count;   // count: packs of the thread
    int64_t row, group_row;    // of the block's first channel in a tensor (n, c), of its first group in one (n, groups)
    int64_t start;             // of the thread's first pack
    int step;                  // from pack to pack; an image has less than 2^31 numbers

    REFINE_DEVICE Part(const GroupNormSiluRecord& record, int block, int thread_index) : r(record), thread(thread_index) {
        channels = int(r.channels);
        lanes = int(r.lanes);
        columns = channels / kWidth;
        threads = columns * lanes;
        groups = channels / int(r.per_group);
        const int blocks = int(r.c) / channels;  // of an image
        image = block / blocks;
        first = (block - image * blocks) * channels;
        row = int64_t(image) * r.c + first;
        group_row = int64_t(image) * (int(r.c) / int(r.per_group)) + first / int(r.per_group);
        lane = Last ? thread / columns : thread % lanes;
        column = Last ? thread % columns : thread / lanes;
        const int packs = int(Last ? r.area : r.area / kCount);
        count = lane < packs ? (packs - lane + lanes - 1) / lanes : 0;
        start = Last ? (int64_t(image) * r.area + lane) * r.c + first + column * kCount
                     : (row + column) * r.area + lane * kCount;
        step = Last ? lanes * int(r.c) : lanes * kCount;
    }

    REFINE_DEVICE const Number* x() const { return reinterpret_cast<const Number*>(r.x); }

    // The first number of a channel of the block.
    REFINE_DEVICE int64_t head(int channel) const {
        return Last ? int64_t(image) * r.area * r.c + first + channel : (row + channel) * r.area;
    }

    REFINE_DEVICE float pilot(int channel) const {
        return r.total ? Source<Number, Last>(r, image, first + channel).template read<1>(0).at(0)
                       : load(x()[head(channel)]);
    }

    // The pilots of the thread's channels, as they lie in memory.
    REFINE_DEVICE Pack<Number, kWidth> pilots() const {
        return r.total ? Source<Number, Last>(r, image, first + column * kWidth).template read<kWidth>(0)
                       : load_pack<Number, kWidth>(x() + head(column * kWidth));
    }

    // Where the thread's numbers of the sum come from, and its distance from pack to pack there.
    REFINE_DEVICE Source<Number, Last> source() const {
        Source<Number, Last> found(r, image, first + column * kWidth);
        found.start += Last ? lane * found.channels : int64_t(lane) * kCount;
        found.step = Last ? lanes * int(found.channels) : lanes * kCount;
        return found;
    }

    // The numbers of a thread's channels, of those of all channels of the block.
    REFINE_DEVICE void own(const float* all, float (&mine)[kWidth]) const {
        REFINE_UNROLL
        for (int w = 0; w < kWidth; ++w) mine[w] = all[column * kWidth + w];
    }

    REFINE_DEVICE float weighted(int64_t address, int channel) const {
        return r.float_weights ? reinterpret_cast<const float*>(address)[first + channel]
                               : load(reinterpret_cast<const Number*>(address)[first + channel]);
    }

    REFINE_DEVICE float embedded(int64_t address, int64_t row_step, int channel) const {
        return address ? load(reinterpret_cast<const Number*>(address)[image * row_step + first + channel]) : 0.0f;
    }

    REFINE_DEVICE float weight(int channel) const { return weighted(r.weight, channel); }
    REFINE_DEVICE float bias(int channel) const { return weighted(r.bias, channel); }
    REFINE_DEVICE float before(int channel) const { return embedded(r.before, r.before_step, channel); }
    REFINE_DEVICE float factor(int channel) const { return embedded(r.scale, r.scale_step, channel) + 1.0f; }
    REFINE_DEVICE float shift(int channel) const { return embedded(r.shift, r.shift_step, channel); }

    REFINE_DEVICE double* stats(int group) const {  // of the block
        return reinterpret_cast<double*>(r.stats) + (group_row + group) * 2;
    }

    // Where a thread leaves its sum for others: threads that write or read side by side meet different banks.
    REFINE_DEVICE int place(int w, int its_column, int its_lane) const {
        return Last ? (w * (lanes + 1) + its_lane) * columns + its_column : its_column * (lanes + 1) + its_lane;
    }

    // Adds up what the threads of each channel have: totals[channel], which may be read after a barrier.
    REFINE_DEVICE void add_up(const float (&sums)[kWidth], float* work, float* totals) const {
        const int shares = threads >= channels ? threads / channels : 1;
        float* parts = work + kWidth * columns * (lanes + 1);
        REFINE_UNROLL
        for (int w = 0; w < kWidth; ++w) work[place(w, column, lane)] = sums[w];
        __syncthreads();
        for (int i = thread; i < channels * shares; i += threads) {
            const int share = i / channels, channel = i - share * channels;
            float sum = 0.0f;
            for (int other = share; other < lanes; other += shares)
                sum += work[place(channel % kWidth, channel / kWidth, other)];
            parts[i] = sum;
        }
        __syncthreads();
        for (int channel = thread; channel < channels; channel += threads) {
            float sum = 0.0f;
            for (int share = 0; share < shares; ++share) sum += parts[share * channels + channel];
            totals[channel] = sum;
        }
    }
};

// 1 / (1 + e^−z)
REFINE_DEVICE float logistic(float z) {
#ifdef __CUDA_ARCH__
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power + 1.0f));
    return result;
#else
    return 1.0f / (1.0f + std::exp(-z));
#endif
}

REFINE_DEVICE float value_at(bool silu, float z) { return silu ? z * logistic(z) : z; }

REFINE_DEVICE float slope_at(bool silu, float z) {
    const float s = logistic(z);
    return silu ? s * (z * (1.0f - s) + 1.0f) : 1.0f;
}

// Calls use(index, pack) for the packs of a thread from `from` on; some are read before the first of them is used.
template <int Ahead, class Read, class Use>
REFINE_DEVICE void in_rounds(int from, int count, Read read, Use use) {
    for (int done = from; done < count; done += Ahead) {
        decltype(read(0)) packs[Ahead];
        REFINE_UNROLL
        for (int k = 0; k < Ahead; ++k)
            if (done + k < count) packs[k] = read(done + k);
        REFINE_UNROLL
        for (int k = 0; k < Ahead; ++k)
            if (done + k < count) use(done + k, packs[k]);
    }
}

constexpr int kMostThreads = 512;  // each may have 128 registers
// Packs that a thread keeps: forward, of x and dy, and of the rest.
[[maybe_unused]] constexpr int kHeld = 16, kHeldPairs = 4, kAhead = 2;

template <class Number, bool Last, bool Wide>
__global__ void __launch_bounds__(kMostThreads) group_norm_forward(const GroupNormSiluRecord record) {
    using Mine = Part<Number, Last, Wide>;
    constexpr int count = Mine::kCount, width = Mine::kWidth;
    using Numbers = Pack<Number, count>;
    extern __shared__ double shared_bytes[];
    const Mine part(record, blockIdx.x, threadIdx.x);
    const bool silu = record.silu;
    float* sums = reinterpret_cast<float*>(shared_bytes);  // of the channels, as are the next four
    float *squares = sums + part.channels, *offsets = squares + part.channels;
    float *gains = offsets + part.channels, *biases = gains + part.channels;
    float *means = biases + part.channels, *rstds = means + part.channels;  // of the groups
    float* work = rstds + part.channels;
    const auto source = part.source();
    Number* total = reinterpret_cast<Number*>(record.total) + part.start;
    const Number* x = record.total ? total : part.x() + part.start;
    const auto read = [&](int k) { return load_pack<Number, count>(x + k * part.step); };
    const auto read_first = [&](int k) {
        if (!record.total) return read(k);
        const Numbers pack = source.template read<count>(k);
        *reinterpret_cast<Numbers*>(total + k * part.step) = pack;
        return pack;
    };

    Numbers held[kHeld];
    REFINE_UNROLL
    for (int k = 0; k < kHeld; ++k)
        if (k < part.count) held[k] = read_first(k);
    // Means are counted from the pilot of the group's first channel, with what is added to it.
    const int per_group = int(record.per_group);
    for (int c = part.thread; c < part.channels; c += part.threads) {
        const int base = c / per_group * per_group;
        const float factor = part.factor(c);
        offsets[c] = (part.pilot(c) - part.pilot(base)) + (part.before(c) - part.before(base));
        gains[c] = part.weight(c) * factor;
        biases[c] = part.bias(c) * factor + part.shift(c);
    }
    const Pack<Number, width> pilots = part.pilots();
    float sum[width] = {}, square[width] = {};
    const auto add = [&](int, const Numbers& pack) {
        REFINE_UNROLL
        for (int i = 0; i < count; ++i) {
            const int w = Last ? i : 0;
            const float d = pack.at(i) - pilots.at(w);
            sum[w] += d;
            square[w] += d * d;
        }
    };
    REFINE_UNROLL
    for (int k = 0; k < kHeld; ++k)
        if (k < part.count) add(k, held[k]);
    in_rounds<kAhead>(kHeld, part.count, read_first, add);
    part.add_up(sum, work, sums);
    part.add_up(square, work, squares);
    __syncthreads();

    const float area = float(record.area), numbers = area * float(per_group);
    for (int group = part.thread; group < part.groups; group += part.threads) {
        const int from = group * per_group, to = from + per_group;
        float total = 0.0f, variance = 0.0f;
        for (int c = from; c < to; ++c) total += sums[c] + offsets[c] * area;
        const float mean = total / numbers;
        for (int c = from; c < to; ++c) {
            const float off = offsets[c] - mean;
            variance += squares[c] + off * (2.0f * sums[c] + off * area);
        }
        variance /= numbers;
        means[group] = mean;
        double* stats = part.stats(group);
        stats[0] = double(part.pilot(from)) + double(part.before(from)) + double(mean);
        stats[1] = rstds[group] = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + float(record.eps));
    }
    __syncthreads();

    float a[width], b[width];
    REFINE_UNROLL
    for (int w = 0; w < width; ++w) {
        const int c = part.column * width + w, group = c / per_group;
        a[w] = rstds[group] * gains[c];
        b[w] = biases[c] + (offsets[c] - means[group]) * a[w];
    }
    Number* y = reinterpret_cast<Number*>(record.out) + part.start;
    const auto write = [&](int k, const Numbers& pack) {
        float values[count];
        REFINE_UNROLL
        for (int i = 0; i < count; ++i) {
            const int w = Last ? i : 0;
            values[i] = value_at(silu, (pack.at(i) - pilots.at(w)) * a[w] + b[w]);
        }
        store_pack<Number, count>(y + k * part.step, values);
    };
    REFINE_UNROLL
    for (int k = 0; k < kHeld; ++k)
        if (k < part.count) write(k, held[k]);
    in_rounds<kAhead>(kHeld, part.count, read, write);
}

template <class Number, bool Last, bool Wide>
__global__ void __launch_bounds__(kMostThreads) group_norm_backward(const GroupNormSiluRecord record) {
    using Mine = Part<Number, Last, Wide>;
    constexpr int count = Mine::kCount, width = Mine::kWidth;
    struct Both {
        Pack<Number, count> x, dy;
    };
    extern __shared__ double shared_bytes[];
    const Mine part(record, blockIdx.x, threadIdx.x);
    const bool silu = record.silu;
    float* sum_dz = reinterpret_cast<float*>(shared_bytes);  // Σ dz, Σ dz · d, Σ d of the channels
    float *sum_dz_d = sum_dz + part.channels, *sum_d = sum_dz_d + part.channels;
    float *offs = sum_d + part.channels, *as = offs + part.channels, *bs = as + part.channels;
    float *flats = bs + part.channels, *tilts = flats + part.channels;  // of the groups
    float* work = tilts + part.channels;
    const Number *x = part.x() + part.start, *dy = reinterpret_cast<const Number*>(record.dy) + part.start;
    const auto read = [&](int k) {
        return Both{load_pack<Number, count>(x + k * part.step), load_pack<Number, count>(dy + k * part.step)};
    };

    Both held[kHeldPairs];
    REFINE_UNROLL
    for (int k = 0; k < kHeldPairs; ++k)
        if (k < part.count) held[k] = read(k);
    const int per_group = int(record.per_group);
    for (int c = part.thread; c < part.channels; c += part.threads) {
        const double* stats = part.stats(c / per_group);
        const float factor = part.factor(c), a = float(stats[1]) * part.weight(c) * factor;
        const float off = float(double(part.pilot(c)) + double(part.before(c)) - stats[0]);
        offs[c] = off;  // x + before − mean = d + off
        as[c] = a;
        bs[c] = part.bias(c) * factor + part.shift(c) + off * a;
    }
    __syncthreads();
    const Pack<Number, width> pilots = part.pilots();
    float a[width], b[width], dz_sum[width] = {}, dz_d_sum[width] = {}, d_sum[width] = {};
    part.own(as, a);
    part.own(bs, b);
    const auto add = [&](int, const Both& both) {
        REFINE_UNROLL
        for (int i = 0; i < count; ++i) {
            const int w = Last ? i : 0;
            const float d = both.x.at(i) - pilots.at(w);
            const float dz = both.dy.at(i) * slope_at(silu, d * a[w] + b[w]);
            dz_sum[w] += dz;
            dz_d_sum[w] += dz * d;
            d_sum[w] += d;
        }
    };
    REFINE_UNROLL
    for (int k = 0; k < kHeldPairs; ++k)
        if (k < part.count) add(k, held[k]);
    in_rounds<kAhead>(kHeldPairs, part.count, read, add);
    part.add_up(dz_sum, work, sum_dz);
    part.add_up(dz_d_sum, work, sum_dz_d);
    if (record.d_before) part.add_up(d_sum, work, sum_d);
    __syncthreads();

    // dx = rstd · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)), dx̂ = dz · gain
    const float area = float(record.area), numbers = area * float(per_group);
    for (int group = part.thread; group < part.groups; group += part.threads) {
        const int from = group * per_group, to = from + per_group;
        const float rstd = float(part.stats(group)[1]);
        float flat = 0.0f, tilt = 0.0f;  // of dz times as = rstd · gain
        for (int c = from; c < to; ++c) {
            flat += sum_dz[c] * as[c];
            tilt += (sum_dz_d[c] + offs[c] * sum_dz[c]) * as[c];
        }
        flats[group] = flat / numbers;
        tilts[group] = rstd * rstd * tilt / numbers;
    }
    __syncthreads();

    for (int c = part.thread; c < part.channels; c += part.threads) {
        const int group = c / per_group;
        const float rstd = float(part.stats(group)[1]), factor = part.factor(c);
        const float dz = sum_dz[c], dz_x = (sum_dz_d[c] + offs[c] * dz) * rstd;  // Σ dz · x̂
        const float tilt = tilts[group], q = flats[group] + offs[c] * tilt;
        float* shares = reinterpret_cast<float*>(record.shares) + part.row + c;
        shares[0] = dz_x * factor;
        shares[record.n * record.c] = dz * factor;
        const auto give = [&](int64_t to, float value) { store(reinterpret_cast<Number*>(to) + part.row + c, value); };
        if (record.d_before) give(record.d_before, dz * as[c] - sum_d[c] * tilt - q * area);
        if (record.d_scale) give(record.d_scale, dz_x * part.weight(c) + dz * part.bias(c));
        if (record.d_shift) give(record.d_shift, dz);
        bs[c] = tilt;
        offs[c] = q;
    }
    __syncthreads();
    float tilt[width], q[width];
    part.own(bs, tilt);
    part.own(offs, q);
    const auto source = part.source();
    const bool summed = record.own;
    Number* dx = summed ? reinterpret_cast<Number*>(source.own ? record.out : record.d_beside) + source.start
                        : reinterpret_cast<Number*>(record.out) + part.start;
    const int step = summed ? source.step : part.step;
    const float factor = summed && source.own ? float(record.factor) : 1.0f;
    const Number* dtotal = record.dtotal ? reinterpret_cast<const Number*>(record.dtotal) + part.start : nullptr;
    const auto write = [&](int k, const Both& both) {
        float values[count];
        Pack<Number, count> more = {};
        if (dtotal) more = load_pack<Number, count>(dtotal + k * part.step);
        REFINE_UNROLL
        for (int i = 0; i < count; ++i) {
            const int w = Last ? i : 0;
            const float d = both.x.at(i) - pilots.at(w);
            const float dz = both.dy.at(i) * slope_at(silu, d * a[w] + b[w]);
            values[i] = (dz * a[w] - d * tilt[w] - q[w] + more.at(i)) * factor;
        }
        store_pack<Number, count>(dx + k * step, values);
    };
    REFINE_UNROLL
    for (int k = 0; k < kHeldPairs; ++k)
        if (k < part.count) write(k, held[k]);
    in_rounds<kAhead>(kHeldPairs, part.count, read, write);
}

}  // namespace refine
