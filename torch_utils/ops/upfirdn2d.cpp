// upfirdn2d on the CPU: every output row is a weighted sum of input rows, filtered along the row.
//
// A filter of rank one (all that networks use) takes two passes, column then row, through one row that stays in the
// cache; any other takes one row pass per row of taps. No loop over elements has a branch, so all of them vectorise.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "kernels.h"

namespace refine {
namespace {

constexpr int64_t kWideStep = 32;  // from so many channels on, a pixel is a loop of its own

// out[i] = Σ_j weight[j] · row[j][i] over `count` rows, four at a time.
template <int Count, bool Add, class In, class Out, class Acc>
inline void sum_rows_fixed(Out* __restrict__ out, const In* const* row, const Acc* weight, int64_t length) {
    const In* r0 = row[0];
    const In* r1 = row[Count > 1 ? 1 : 0];
    const In* r2 = row[Count > 2 ? 2 : 0];
    const In* r3 = row[Count > 3 ? 3 : 0];
    const Acc w0 = weight[0], w1 = weight[Count > 1 ? 1 : 0], w2 = weight[Count > 2 ? 2 : 0];
    const Acc w3 = weight[Count > 3 ? 3 : 0];
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
        Acc sum = w0 * Acc(load(r0[i]));
        if (Count > 1) sum += w1 * Acc(load(r1[i]));
        if (Count > 2) sum += w2 * Acc(load(r2[i]));
        if (Count > 3) sum += w3 * Acc(load(r3[i]));
        if (Add) sum += Acc(load(out[i]));
        store(&out[i], sum);
    }
}

template <bool Add, class In, class Out, class Acc>
inline void sum_rows_up_to_4(Out* out, const In* const* row, const Acc* weight, int64_t count, int64_t length) {
    if (count >= 4) return sum_rows_fixed<4, Add>(out, row, weight, length);
    if (count == 3) return sum_rows_fixed<3, Add>(out, row, weight, length);
    if (count == 2) return sum_rows_fixed<2, Add>(out, row, weight, length);
    if (count == 1) return sum_rows_fixed<1, Add>(out, row, weight, length);
}

// `scratch` (Acc, length) is touched only where more than four rows meet a narrower type.
template <class In, class Out, class Acc>
void sum_rows(Out* out, const In* const* row, const Acc* weight, int64_t count, int64_t length, Acc* scratch) {
    if (count == 0) {
        for (int64_t i = 0; i < length; ++i) store(&out[i], Acc(0));
    } else if (count <= 4) {
        sum_rows_up_to_4<false>(out, row, weight, count, length);
    } else {
        sum_rows_fixed<4, false>(scratch, row, weight, length);
        int64_t done = 4;
        for (; done + 4 < count; done += 4) sum_rows_fixed<4, true>(scratch, row + done, weight + done, length);
        sum_rows_up_to_4<true>(scratch, row + done, weight + done, count - done, length);
        for (int64_t i = 0; i < length; ++i) store(&out[i], scratch[i]);
    }
}

template <class Number>
class Filter {
    using Acc = typename AccOf<Number>::type;

public:
    explicit Filter(const Upfirdn2dCall& call)
        : call_(call),
          x_{call.w, call.out_w, call.fw, call.upx, call.downx, call.px0},
          y_{call.h, call.out_h, call.fh ? call.fh : call.fw, call.upy, call.downy, call.py0},
          step_(call.channels_last ? call.c : 1),
          images_(call.channels_last ? call.n : call.n * call.c) {
        arrange_taps();
        left_ = at_least(-first_sample(x_, 0), 0);
        const Window last = unclipped_window(x_, x_.out - 1);
        // Rounded up: outputs of both phases read as many samples.
        const int64_t most = (x_.taps + x_.up - 1) / x_.up;
        held_ = at_least(left_ + x_.in, left_ + last.first + most + 2);
        prepare_phases();
        lane_ = ceil_div(held_, stride_);
        for (int64_t o = 0; o < y_.out; ++o) windows_.push_back(window(y_, o));
    }

    // False: no memory for the rows in work.
    bool run() const {
        const int64_t rows = images_ * y_.out, numbers = rows * x_.out * step_;
        const int64_t threads = numbers < 16384 ? 1 : at_least(at_most(call_.threads, rows), 1);
        bool failed = false;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1) schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            try {
                Work work(*this);
                const int64_t begin = rows * part / threads, end = rows * (part + 1) / threads;
                int64_t image = begin / y_.out, row = begin % y_.out;
                for (int64_t i = begin; i < end; ++i) {
                    output_row(image, row, work);
                    if (++row == y_.out) row = 0, ++image;
                }
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        }
        return !failed;
    }

private:
    struct Phase {
        int64_t shift, tap, count;  // outputs o = phase + m · period start at sample shift + m · stride
    };

    struct Work {
        std::vector<Acc> held, sum, row, scratch, lanes, phase;
        std::vector<const Number*> inputs;
        std::vector<const Acc*> shifted;
        std::vector<Acc> weights;
        explicit Work(const Filter& f)
            : held(f.held_ * f.step_),
              sum(f.separable_ ? 0 : f.x_.out * f.step_),
              row(f.separable_ ? 0 : f.x_.out * f.step_),
              scratch(std::max(f.x_.out, f.x_.in) * f.step_),
              lanes(f.lane_ * f.stride_ * (f.step_ < kWideStep ? f.step_ : 0)),
              phase(f.step_ < kWideStep ? f.x_.out * f.step_ : 0),
              inputs(f.y_.taps),
              shifted(f.x_.taps),
              weights(std::max(f.x_.taps, f.y_.taps)) {}
    };

    // Taps in correlation order, gain included; as column · row where the filter has rank one up to rounding.
    void arrange_taps() {
        const Acc* f = reinterpret_cast<const Acc*>(call_.f);
        const int64_t height = y_.taps, width = x_.taps;
        separable_ = true;
        if (call_.fh == 0) {
            for (int64_t i = 0; i < width; ++i) row_taps_.push_back(f[call_.flip ? i : width - 1 - i]);
            column_taps_ = row_taps_;
        } else {
            for (int64_t i = 0; i < height * width; ++i) taps_.push_back(f[call_.flip ? i : height * width - 1 - i]);
            int64_t pivot = 0;
            for (int64_t i = 0; i < height * width; ++i)
                if (std::fabs(taps_[i]) > std::fabs(taps_[pivot])) pivot = i;
            const Acc top = taps_[pivot];
            for (int64_t i = 0; i < height; ++i) column_taps_.push_back(taps_[i * width + pivot % width]);
            for (int64_t j = 0; j < width; ++j) row_taps_.push_back(top == 0 ? 0 : taps_[pivot / width * width + j] / top);
            const Acc rounding = sizeof(Acc) == 8 ? Acc(4e-16) : Acc(2.4e-7);
            for (int64_t i = 0; i < height * width; ++i) {
                const Acc error = taps_[i] - column_taps_[i / width] * row_taps_[i % width];
                separable_ = separable_ && std::fabs(error) <= rounding * std::fabs(taps_[i]);  // false for a NaN
            }
            for (Acc& tap : taps_) tap *= Acc(call_.gain);
        }
        for (Acc& tap : row_taps_) tap *= Acc(call_.gain);
    }

    // Along a row the window repeats: `period` outputs on, it lies `stride` samples further with the same taps.
    void prepare_phases() {
        int64_t a = x_.up, b = x_.down;
        while (b) std::swap(a %= b, b);
        period_ = x_.up / a;
        stride_ = x_.down / a;
        for (int64_t o = 0; o < period_; ++o) {
            const Window win = unclipped_window(x_, o);
            phases_.push_back({win.first + left_, win.tap, win.count});
        }
    }

    const Number* input_row(int64_t image, int64_t row) const {
        return reinterpret_cast<const Number*>(call_.x) + (image * y_.in + row) * x_.in * step_;
    }

    void output_row(int64_t image, int64_t row_index, Work& work) const {
        const Window& win = windows_[row_index];
        Number* out = reinterpret_cast<Number*>(call_.y) + (image * y_.out + row_index) * x_.out * step_;
        Acc* samples = work.held.data() + left_ * step_;  // zeros to both sides stay as they are
        for (int64_t j = 0; j < win.count; ++j) work.inputs[j] = input_row(image, win.first + j);
        if (separable_) {
            for (int64_t j = 0; j < win.count; ++j) work.weights[j] = column_taps_[win.tap + j * y_.up];
            sum_rows(samples, work.inputs.data(), work.weights.data(), win.count, x_.in * step_, work.scratch.data());
            filter_row(out, row_taps_.data(), work);
            return;
        }
        std::fill(work.sum.begin(), work.sum.end(), Acc(0));
        for (int64_t j = 0; j < win.count; ++j) {
            const Acc one = 1;
            sum_rows_fixed<1, false>(samples, &work.inputs[j], &one, x_.in * step_);
            filter_row(work.row.data(), &taps_[(win.tap + j * y_.up) * x_.taps], work);
            const Acc* row = work.row.data();
            sum_rows_fixed<1, true>(work.sum.data(), &row, &one, x_.out * step_);
        }
        const Acc* sum = work.sum.data();
        const Acc one = 1;
        sum_rows_fixed<1, false>(out, &sum, &one, x_.out * step_);
    }

    template <class Out>
    void filter_row(Out* out, const Acc* taps, Work& work) const {
        const Acc* held = work.held.data();
        if (period_ == 1 && (stride_ == 1 || x_.out == 1)) return filter_dense(out, taps, work);
        if (step_ == 1 && period_ == 2 && stride_ == 1) return filter_up_2(out, taps, work);
        if (step_ == 1 && period_ == 1 && stride_ == 2) return filter_down_2(out, taps, work);
        if (step_ < kWideStep) return filter_lanes(out, taps, work);
        for (int64_t o = 0; o < x_.out; ++o) {  // whole vectors of channels
            const Phase& phase = phases_[o % period_];
            const Acc* from = held + (phase.shift + o / period_ * stride_) * step_;
            gather_taps(phase, from, taps, work);
            sum_rows(out + o * step_, work.shifted.data(), work.weights.data(), phase.count, step_, work.scratch.data());
        }
    }

    void gather_taps(const Phase& phase, const Acc* from, const Acc* taps, Work& work) const {
        for (int64_t k = 0; k < phase.count; ++k) {
            work.shifted[k] = from + k * step_;
            work.weights[k] = taps[phase.tap + k * x_.up];
        }
    }

    template <class Out>
    void filter_dense(Out* out, const Acc* taps, Work& work) const {
        const Phase& phase = phases_[0];
        gather_taps(phase, work.held.data() + phase.shift * step_, taps, work);
        const int64_t length = x_.out * step_;
        sum_rows(out, work.shifted.data(), work.weights.data(), phase.count, length, work.scratch.data());
    }

    template <class Out>
    void filter_up_2(Out* __restrict__ out, const Acc* taps, Work& work) const {
        const Acc* held = work.held.data();
        const Phase &even = phases_[0], &odd = phases_[1];
        if (x_.taps != 4) return filter_lanes(out, taps, work);
        const Acc a0 = taps[even.tap], a1 = taps[even.tap + 2], b0 = taps[odd.tap], b1 = taps[odd.tap + 2];
        const Acc *from_even = held + even.shift, *from_odd = held + odd.shift;
        const int64_t pairs = x_.out / 2;
#pragma GCC ivdep
        for (int64_t m = 0; m < pairs; ++m) {
            store(&out[2 * m], a0 * from_even[m] + a1 * from_even[m + 1]);
            store(&out[2 * m + 1], b0 * from_odd[m] + b1 * from_odd[m + 1]);
        }
        if (x_.out % 2) store(&out[2 * pairs], a0 * from_even[pairs] + a1 * from_even[pairs + 1]);
    }

    template <class Out>
    void filter_down_2(Out* __restrict__ out, const Acc* taps, Work& work) const {
        const Acc* from = work.held.data() + phases_[0].shift;
        if (x_.taps != 4) return filter_lanes(out, taps, work);
        Acc* __restrict__ even = work.lanes.data();
        Acc* __restrict__ odd = even + lane_;
        for (int64_t m = 0; m < x_.out + 1; ++m) {
            even[m] = from[2 * m];
            odd[m] = from[2 * m + 1];
        }
        const Acc t0 = taps[0], t1 = taps[1], t2 = taps[2], t3 = taps[3];
#pragma GCC ivdep
        for (int64_t m = 0; m < x_.out; ++m)
            store(&out[m], t0 * even[m] + t1 * odd[m] + (t2 * even[m + 1] + t3 * odd[m + 1]));
    }

    // Any period and stride, few channels: samples sorted into `stride` lanes make every phase one loop over a row.
    template <class Out>
    void filter_lanes(Out* out, const Acc* taps, Work& work) const {
        const Acc* held = work.held.data();
        if (stride_ > 1) {
            for (int64_t lane = 0; lane < stride_; ++lane)
                for (int64_t m = 0; m < lane_; ++m)
                    copy(&work.lanes[(lane * lane_ + m) * step_], held + at_most(m * stride_ + lane, held_ - 1) * step_);
            held = work.lanes.data();
        }
        for (int64_t p = 0; p < std::min(period_, x_.out); ++p) {
            const Phase& phase = phases_[p];
            for (int64_t k = 0; k < phase.count; ++k) {
                const int64_t sample = phase.shift + k;
                work.shifted[k] = held + (sample % stride_ * lane_ + sample / stride_) * step_;
                work.weights[k] = taps[phase.tap + k * x_.up];
            }
            const int64_t outputs = (x_.out - p + period_ - 1) / period_, length = outputs * step_;
            if (period_ == 1) {
                sum_rows(out, work.shifted.data(), work.weights.data(), phase.count, length, work.scratch.data());
                return;
            }
            Acc* sums = work.phase.data();
            sum_rows(sums, work.shifted.data(), work.weights.data(), phase.count, length, work.scratch.data());
            for (int64_t m = 0; m < outputs; ++m) copy(out + (m * period_ + p) * step_, sums + m * step_);
        }
    }

    // One sample.
    template <class Out>
    void copy(Out* to, const Acc* from) const {
        if (step_ == 3) {  // images
            store(&to[0], from[0]), store(&to[1], from[1]), store(&to[2], from[2]);
        } else {
            for (int64_t i = 0; i < step_; ++i) store(&to[i], from[i]);
        }
    }

    const Upfirdn2dCall& call_;
    const Axis x_, y_;
    const int64_t step_, images_;  // numbers of a sample that lie side by side; images (or planes)
    int64_t left_, held_, lane_, period_, stride_;  // zeros before a row in work; its length and a lane's, in samples
    bool separable_;
    std::vector<Acc> taps_, column_taps_, row_taps_;
    std::vector<Phase> phases_;
    std::vector<Window> windows_;  // of every output row
};

template <class Number>
int run(const Upfirdn2dCall& call) {
    return Filter<Number>(call).run() ? kOk : kOutOfMemory;
}

}  // namespace
}  // namespace refine

extern "C" int refine_upfirdn2d(const void* packed) {
    using namespace refine;
    Upfirdn2dCall call;
    memcpy(&call, packed, sizeof(call));
    if (call.n * call.c * call.out_h * call.out_w == 0) return kOk;
    try {
        switch (call.dtype) {
            case kFloat32: return run<float>(call);
            case kFloat64: return run<double>(call);
            case kFloat16: return run<Float16>(call);
            case kBFloat16: return run<BFloat16>(call);
        }
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kBadDType;
}
