// Group normalisation, scale, shift and silu on the CPU in one go, forward and backward, float32.
//
//     y = silu(z),   z = (x̂ · weight + bias) · (scale + 1) + shift,   x̂ = (x + before − mean) · rstd
//
// For one channel of one image that is z = (x − m) · a + b. A task (a group of planes, or an image of pixels) is read for
// its statistics, and again for y while the cache still holds it. The backward pass is given x and the statistics alone
// and takes the exponential again; dz lies in dx until the sums over it are known.
// Sums run in float over short stretches, then in double, always in the same order: threads change nothing.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "vectors.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace refine {
namespace {

// One call, as the Python side packs it: eight bytes a field. weight and bias are (c,); before, scale and shift are (n, c)
// or null, with so many numbers from row to row. Gradients are dense, or null where nobody asks.
struct GroupNormSiluCall {
    int64_t x, y, stats;  // stats: double (n, groups, 2), means and 1/√(variance + eps); the forward pass writes them
    int64_t weight, bias, before, scale, shift;
    int64_t before_step, scale_step, shift_step;
    int64_t dy, dx, d_weight, d_bias, d_before, d_scale, d_shift;  // dy: null in the forward pass
    int64_t channels_last, n, c, area, groups;
    double eps;
    int64_t threads;
};

using V = Vec<float>;
typedef int32_t Ints __attribute__((vector_size(32)));
constexpr int64_t kWide = kLanes<float>;
constexpr int64_t kStretch = 64;          // numbers that a lane sums up in float
constexpr int64_t kLine = 128;            // pixels: a line has so many numbers at least
constexpr int64_t kLines = 16;            // so many lines are gone through column by column
constexpr int64_t kPart = 16;            // pixels: a part has a multiple of so many channels, a line of the cache
constexpr int64_t kPlanes = 4096;        // planes: a task of several groups has so many numbers at most
constexpr int64_t kSmallTensor = 32768;  // not worth waking threads

#define REFINE_INLINE inline __attribute__((always_inline))
#define REFINE_LAMBDA __attribute__((always_inline))

REFINE_INLINE V all(float x) { return x - V{}; }

REFINE_INLINE V clamped(V z, V low, V high) {  // a NaN stays one
#ifdef __AVX__
    return _mm256_min_ps(high, _mm256_max_ps(low, z));
#else
    z = low > z ? low : z;
    return high < z ? high : z;
#endif
}

// 1 + e^−z, wrong by at most 1.5 units in the last place (so silu by 3), constant beyond −88.7 and 87.3. A NaN stays one.
REFINE_INLINE V one_and_exp(V z) {
    const V low = all(-88.7f), high = all(87.3f);
    z = clamped(z, low, high);
    // e^−z = 2^k · e^r, |r| ≤ ln 2 / 2. A sum with 1.5 · 2^23 is rounded to an integer, which its low bits hold.
    const float magic = 12582912.0f;
    const V shifted = z * -1.44269504f + magic, k = shifted - magic;
    const V r = (k * -0.693359375f - z) + k * 2.12194440e-4f;  // −z − k · ln 2; the first product is exact
    // e^r = 1 + r + r² · q(r); q is the minimax polynomial, 5e-9 of e^r. Estrin's order: a third less waiting than Horner's.
    const V square = r * r;
    const V q01 = r * 0.166665196f + 0.49999994f, q23 = r * 8.36878084e-3f + 4.16683927e-2f;
    const V q = (square * 1.38144672e-3f + q23) * square + q01;
    const V power = q * square + (r + 1.0f);
    return V(Ints(power) + (Ints(shifted) << 23)) + 1.0f;
}

// A vector of a line, or the first numbers of one with zeros behind.
struct Whole {
    REFINE_INLINE V load(const float* from) const { return load_vec(from); }
    REFINE_INLINE void store(float* to, const V& v) const { store_vec<float, float>(to, v); }
    REFINE_INLINE V only(const V& v) const { return v; }
};

struct Part {
    int64_t count;

    REFINE_INLINE V load(const float* from) const {
        V v{};
        for (int64_t i = 0; i < count; ++i) v[i] = from[i];
        return v;
    }
    REFINE_INLINE void store(float* to, const V& v) const {
        for (int64_t i = 0; i < count; ++i) to[i] = v[i];
    }
    REFINE_INLINE V only(const V& v) const { return first_lanes<float>(v, count); }
};

template <class Body>
REFINE_INLINE void each_vector(int64_t length, Body body) {
    int64_t i = 0;
    for (; i + kWide <= length; i += kWide) body(i, Whole());
    if (i < length) body(i, Part{length - i});
}

// What the channels of a task need: planes use the first number for each channel, pixels all numbers of a line.
struct Coefs {
    const float *m, *a, *b, *q;
};

// The same for a vector of x.
struct Lanes {
    V m, a, b, q;
};

// What is done with each vector of x, at `i`, and the terms of which sums over a channel it brings.

struct Moments {  // of x − m
    static constexpr int kSums = 2;
    const float* x;

    template <class Size>
    REFINE_INLINE void step(int64_t i, Size size, const Lanes& k, V* terms) const {
        terms[0] = size.only(size.load(x + i) - k.m);
        terms[1] = terms[0] * terms[0];
    }
};

struct Values {  // y = silu((x − m) · a + b)
    static constexpr int kSums = 0;
    const float* x;
    float* y;

    template <class Size>
    REFINE_INLINE void step(int64_t i, Size size, const Lanes& k, V*) const {
        const V z = (size.load(x + i) - k.m) * k.a + k.b;
        size.store(y + i, z / one_and_exp(z));
    }
};

struct Slopes {  // dz = dy · silu'(z); the sums of x − m, dz and dz · (x − m)
    static constexpr int kSums = 3;
    const float *x, *dy;
    float* dz;

    template <class Size>
    REFINE_INLINE void step(int64_t i, Size size, const Lanes& k, V* terms) const {
        const V d = size.only(size.load(x + i) - k.m);
        const V z = d * k.a + k.b, s = 1.0f / one_and_exp(z);
        const V slope = size.load(dy + i) * (s * z * (1.0f - s) + s);
        size.store(dz + i, slope);
        terms[0] = d;
        terms[1] = slope;
        terms[2] = slope * d;
    }
};

struct Gradients {  // dx = dz · a − (x − m) · b − q, in place of dz
    static constexpr int kSums = 0;
    const float* x;
    float* dx;

    template <class Size>
    REFINE_INLINE void step(int64_t i, Size size, const Lanes& k, V*) const {
        const V d = size.load(x + i) - k.m;
        size.store(dx + i, size.load(dx + i) * k.a - d * k.b - k.q);
    }
};

REFINE_INLINE float sum_of(const V& v) {
    typedef float Half __attribute__((vector_size(16)));
    Half halves[2];
    memcpy(halves, &v, sizeof(v));
    const Half sums = halves[0] + halves[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

template <class Work, class Size>
REFINE_INLINE void add_step(const Work& work, int64_t i, Size size, const Lanes& k, V* sums) {
    V terms[3];
    work.step(i, size, k, terms);
#pragma GCC unroll 3
    for (int s = 0; s < Work::kSums; ++s) sums[s] += terms[s];
}

// A task is a group of an image, or several if they are small: its channels are rows of `area` numbers.
struct Planes {
    const int64_t channels, area, tasks, line;

    static int64_t start(const GroupNormSiluCall& call, int64_t image, int64_t channel) {
        return (image * call.c + channel) * call.area;
    }

    explicit Planes(const GroupNormSiluCall& call)
        : channels(channels_of(call)), area(call.area), tasks(call.n * call.c / channels), line(channels) {}

    static int64_t channels_of(const GroupNormSiluCall& call) {
        const int64_t per_group = call.c / call.groups;
        int64_t together = at_least(at_most(kPlanes / (per_group * call.area), call.groups), 1);
        while (call.groups % together) --together;
        return together * per_group;
    }

    template <class Work>
    void run(const Work& work, const Coefs& k, float*, double* totals) const {
        std::fill_n(totals, channels * Work::kSums, 0.0);
        for (int64_t c = 0; c < channels; ++c) {
            const Lanes lanes{all(k.m[c]), all(k.a[c]), all(k.b[c]), all(k.q[c])};
            for (int64_t i = 0; i < area; i += kStretch * kWide) {
                V sums[3] = {V{}, V{}, V{}};  // {} alone becomes a slow `rep stos`
                each_vector(std::min(kStretch * kWide, area - i), [&](int64_t j, auto size) REFINE_LAMBDA {
                    add_step(work, c * area + i + j, size, lanes, sums);
                });
#pragma GCC unroll 3
                for (int s = 0; s < Work::kSums; ++s) totals[s * channels + c] += sum_of(sums[s]);
            }
        }
    }
};

// A task is an image: lines of so many pixels that whole vectors fit, each number of a line with its channel's. Where
// there are more threads than images and a line is a pixel, it is a part of the channels; the sums are the same.
struct Pixels {
    const int64_t channels, area, tasks, line, step;  // from line to line

    static int64_t start(const GroupNormSiluCall& call, int64_t image, int64_t channel) {
        return image * call.c * call.area + channel;
    }

    explicit Pixels(const GroupNormSiluCall& call)
        : channels(call.c / parts_of(call)),
          area(call.area),
          tasks(call.n * parts_of(call)),
          line(channels == call.c ? line_of(call.c) : channels),
          step(channels == call.c ? line : call.c) {}

    static int64_t parts_of(const GroupNormSiluCall& call) {
        int64_t parts = 1;
        const auto divides = [&](int64_t p) { return call.groups % p == 0 && call.c % (p * kPart) == 0; };
        while (line_of(call.c) == call.c && call.n * parts < call.threads && divides(2 * parts)) parts *= 2;
        return parts;
    }

    static int64_t line_of(int64_t channels) {  // a multiple of the channels and of a vector
        const int64_t whole = channels % 8 == 0 ? channels : channels % 4 == 0 ? 2 * channels : 8 * channels;
        return whole * ceil_div(kLine, whole);
    }

    template <class Work>
    void run(const Work& work, const Coefs& k, float* sums, double* totals) const {
        const int64_t numbers = area * channels;
        std::fill_n(totals, channels * Work::kSums, 0.0);
        for (int64_t done = 0; done < numbers;) {
            const int64_t lines = at_most((numbers - done) / line, kLines), length = lines ? line : numbers - done;
            const int64_t from = done / line * step;
            each_vector(length, [&](int64_t i, auto size) REFINE_LAMBDA {
                const Lanes lanes{load_vec(k.m + i), load_vec(k.a + i), load_vec(k.b + i), load_vec(k.q + i)};
                V total[3] = {V{}, V{}, V{}};
                for (int64_t at = from + i, end = at + at_least(lines, 1) * step; at < end; at += step)
                    add_step(work, at, size, lanes, total);
#pragma GCC unroll 3
                for (int s = 0; s < Work::kSums; ++s) store_vec<float, float>(sums + s * line + i, total[s]);
            });
            for (int s = 0; s < Work::kSums; ++s)
                for (int64_t i = 0; i < length; i += channels) add(totals + s * channels, sums + s * line + i);
            done += at_least(lines, 1) * line;
        }
    }

    void add(double* __restrict__ totals, const float* __restrict__ sums) const {
        for (int64_t c = 0; c < channels; ++c) totals[c] += sums[c];
    }
};

// What a task works with.
class Scratch {
    std::vector<float> numbers_;
    std::vector<double> doubles_;

public:
    float *m, *a, *b, *q, *sums;             // (line), sums (3, line)
    double *before, *gain, *offset, *totals;  // (channels), totals (3, channels); z = x̂ · gain + offset

    template <class Layout>
    explicit Scratch(const Layout& layout) : numbers_(7 * layout.line), doubles_(6 * layout.channels) {
        m = numbers_.data(), a = m + layout.line, b = a + layout.line, q = b + layout.line, sums = q + layout.line;
        before = doubles_.data(), gain = before + layout.channels, offset = gain + layout.channels;
        totals = offset + layout.channels;
    }
    Coefs coefs() const { return {m, a, b, q}; }
};

template <class Layout>
class Pass {
public:
    explicit Pass(const GroupNormSiluCall& call)
        : call_(call), layout_(call), per_group_(call.c / call.groups), count_(double(per_group_ * call.area)) {}

    void run() const {
        const int64_t wanted = call_.n * call_.c * call_.area < kSmallTensor ? 1 : call_.threads;
        const int64_t parts = at_least(at_most(wanted, layout_.tasks), 1);
        std::vector<Scratch> scratches;
        for (int64_t part = 0; part < parts; ++part) scratches.emplace_back(layout_);
        std::vector<double> shares(call_.dy ? call_.n * call_.c * 2 : 0);
#pragma omp parallel for num_threads(int(parts)) if (parts > 1) schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            for (int64_t task = part * layout_.tasks / parts; task < (part + 1) * layout_.tasks / parts; ++task) {
                const Task where(*this, task);
                if (call_.dy)
                    backward(where, scratches[part], shares.data());
                else
                    forward(where, scratches[part]);
            }
        }
        if (call_.dy) store_shares(shares);
    }

private:
    static float* floats(int64_t address) { return reinterpret_cast<float*>(address); }

    struct Task {
        int64_t image, first;  // channel
        int64_t row;           // of `first` in a tensor (n, c)
        int64_t start;         // in x
        double* stats;         // of the first group

        Task(const Pass& pass, int64_t task) {
            const GroupNormSiluCall& call = pass.call_;
            row = task * pass.layout_.channels;
            image = row / call.c;
            first = row % call.c;
            start = Layout::start(call, image, first);
            stats = reinterpret_cast<double*>(call.stats) + row / pass.per_group_ * 2;
        }
    };

    // The task's part of a tensor (n, c), or null.
    static const float* part_of(int64_t address, int64_t step, const Task& task) {
        return address ? floats(address) + task.image * step + task.first : nullptr;
    }

    void prepare(const Task& task, const Scratch& work) const {
        const float *weight = floats(call_.weight) + task.first, *bias = floats(call_.bias) + task.first;
        const float* before = part_of(call_.before, call_.before_step, task);
        const float* scale = part_of(call_.scale, call_.scale_step, task);
        const float* shift = part_of(call_.shift, call_.shift_step, task);
        // A loop each: one with choices in it would become masked loads, and those from a null address take ages.
        std::copy_n(weight, layout_.channels, work.gain);
        std::copy_n(bias, layout_.channels, work.offset);
        std::fill_n(work.before, layout_.channels, 0.0);
        if (before) std::copy_n(before, layout_.channels, work.before);
        for (int64_t c = 0; scale && c < layout_.channels; ++c) {
            work.gain[c] *= scale[c] + 1.0;
            work.offset[c] *= scale[c] + 1.0;
        }
        for (int64_t c = 0; shift && c < layout_.channels; ++c) work.offset[c] += shift[c];
    }

    void forward(const Task& task, Scratch& work) const {
        const float* x = floats(call_.x) + task.start;
        prepare(task, work);
        // Moments about zero, then about the mean that they give: there nothing cancels.
        std::fill_n(task.stats, layout_.channels / per_group_ * 2, 0.0);
        std::fill_n(work.m, layout_.line, 0.0f);
        for (int round = 0; round < 2; ++round) {
            if (round) centre(task, work);
            layout_.run(Moments{x}, work.coefs(), work.sums, work.totals);
            for (int64_t c = 0, group = 0; c < layout_.channels; c += per_group_, ++group)
                take_statistics(c, work, task.stats + 2 * group);
        }
        centre(task, work);
        slopes_and_offsets(task, work);
        layout_.run(Values{x, floats(call_.y) + task.start}, work.coefs(), work.sums, work.totals);
    }

    // Σ (x − m) and Σ (x − m)² of the channels from `first` on → mean and 1/√(variance + eps) of the group.
    void take_statistics(int64_t first, const Scratch& work, double* stats) const {
        const double *sums = work.totals, *squares = work.totals + layout_.channels, area = double(call_.area);
        double sum = 0, square = 0;
        for (int64_t c = first; c < first + per_group_; ++c) {
            const double off = work.m[c] + work.before[c] - stats[0];  // x + before − mean = (x − m) + off
            sum += sums[c] + off * area;
            square += squares[c] + off * (2 * sums[c] + off * area);
        }
        const double rest = sum / count_, variance = square / count_ - rest * rest;
        stats[0] += rest;
        stats[1] = 1 / std::sqrt((variance < 0 ? 0 : variance) + call_.eps);
    }

    // The loops subtract m = mean − before as a float; what the rounding leaves goes into b and q.
    void centre(const Task& task, const Scratch& work) const {
        const double* stats = task.stats;
        for (int64_t c = 0; c < layout_.channels; stats += 2)
            for (const int64_t end = c + per_group_; c < end; ++c) work.m[c] = float(stats[0] - work.before[c]);
        repeat(work.m);
    }

    double left_by_rounding(int64_t c, const Scratch& work, const double* stats) const {
        return work.m[c] + work.before[c] - stats[0];
    }

    void slopes_and_offsets(const Task& task, const Scratch& work) const {
        const double* stats = task.stats;
        for (int64_t c = 0; c < layout_.channels; stats += 2) {
            for (const int64_t end = c + per_group_; c < end; ++c) {
                const double a = stats[1] * work.gain[c];
                work.a[c] = float(a);
                work.b[c] = float(work.offset[c] + left_by_rounding(c, work, stats) * a);
            }
        }
        repeat(work.a), repeat(work.b);
    }

    void repeat(float* numbers) const {
        for (int64_t i = layout_.channels; i < layout_.line; i += layout_.channels)
            std::copy_n(numbers, layout_.channels, numbers + i);
    }

    void backward(const Task& task, Scratch& work, double* shares) const {
        const float *x = floats(call_.x) + task.start, *dy = floats(call_.dy) + task.start;
        float* dx = floats(call_.dx) + task.start;
        prepare(task, work);
        centre(task, work);
        slopes_and_offsets(task, work);
        layout_.run(Slopes{x, dy, dx}, work.coefs(), work.sums, work.totals);
        for (int64_t c = 0, group = 0; c < layout_.channels; c += per_group_, ++group)
            gradients(task, c, work, task.stats + 2 * group, shares);
        repeat(work.a), repeat(work.b), repeat(work.q);
        layout_.run(Gradients{x, dx}, work.coefs(), work.sums, work.totals);
    }

    // The sums over dz of the channels from `first` on → the gradients of the group's parameters, and what `Gradients`
    // needs: dx = rstd · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)), dx̂ = dz · gain.
    void gradients(const Task& task, int64_t first, const Scratch& work, const double* stats, double* shares) const {
        const double *sum_d = work.totals, *sum_dz = sum_d + layout_.channels;
        double* sum_dz_x = work.totals + 2 * layout_.channels;  // first with x − m, then with x̂
        const double rstd = stats[1];
        double flat = 0, tilted = 0;  // the two means
        for (int64_t c = first; c < first + per_group_; ++c) {
            sum_dz_x[c] = (sum_dz_x[c] + left_by_rounding(c, work, stats) * sum_dz[c]) * rstd;
            flat += sum_dz[c] * work.gain[c] / count_;
            tilted += sum_dz_x[c] * work.gain[c] / count_;
        }
        const double b = rstd * rstd * tilted;
        const float* scale = part_of(call_.scale, call_.scale_step, task);
        for (int64_t c = first; c < first + per_group_; ++c) {
            const int64_t at = task.row + c;
            const double factor = scale ? scale[c] + 1.0 : 1.0;
            const double a = rstd * work.gain[c], q = rstd * flat + left_by_rounding(c, work, stats) * b;
            shares[2 * at] = sum_dz_x[c] * factor;
            shares[2 * at + 1] = sum_dz[c] * factor;
            if (call_.d_before)
                floats(call_.d_before)[at] = float(sum_dz[c] * a - sum_d[c] * b - q * double(call_.area));
            if (call_.d_scale)
                floats(call_.d_scale)[at] = float(sum_dz_x[c] * floats(call_.weight)[task.first + c] +
                                                  sum_dz[c] * floats(call_.bias)[task.first + c]);
            if (call_.d_shift) floats(call_.d_shift)[at] = float(sum_dz[c]);
            work.a[c] = float(a);
            work.b[c] = float(b);
            work.q[c] = float(q);
        }
    }

    // An image's shares of d_weight and d_bias, added up image by image.
    void store_shares(const std::vector<double>& shares) const {
        std::vector<double> sums(2 * call_.c);
        for (int64_t i = 0; i < call_.n; ++i)
            for (int64_t j = 0; j < 2 * call_.c; ++j) sums[j] += shares[i * 2 * call_.c + j];
        for (int64_t c = 0; c < call_.c; ++c) {
            if (call_.d_weight) floats(call_.d_weight)[c] = float(sums[2 * c]);
            if (call_.d_bias) floats(call_.d_bias)[c] = float(sums[2 * c + 1]);
        }
    }

    const GroupNormSiluCall& call_;
    const Layout layout_;
    const int64_t per_group_;  // channels
    const double count_;       // numbers of a group
};

}  // namespace
}  // namespace refine

extern "C" int refine_group_norm_silu(const void* packed) {
    using namespace refine;
    GroupNormSiluCall call;
    memcpy(&call, packed, sizeof(call));
    try {
        if (call.channels_last)
            Pass<Pixels>(call).run();
        else
            Pass<Planes>(call).run();
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kOk;
}
