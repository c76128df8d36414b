// upfirdn2d on the CPU: every output row is a weighted sum of input rows, filtered along the row.
//
// A filter of rank one (all that networks use) takes two passes, column then row, through one row that stays in the
// cache; any other takes one row pass per row of taps. No loop over elements has a branch, so all of them vectorise.

#include <algorithm>
#include <new>
#include <vector>

#include "four_taps.h"
#include "taps.h"

namespace refine {
namespace {

constexpr int64_t kManyChannels = 32;  // from so many channels on, a pixel is a loop of its own

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
    Filter(const Upfirdn2dCall& call, const Taps<Acc>& taps)
        : call_(call),
          taps_(taps),
          x_{call.w, call.out_w, call.fw, call.upx, call.downx, call.px0},
          y_{call.h, call.out_h, call.fh ? call.fh : call.fw, call.upy, call.downy, call.py0},
          step_(call.channels_last ? call.c : 1),
          images_(call.channels_last ? call.n : call.n * call.c) {
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
        return share_rows(rows, numbers, call_.threads, [&](int64_t begin, int64_t end) {
            Work work(*this);
            int64_t image = begin / y_.out, row = begin % y_.out;
            for (int64_t i = begin; i < end; ++i) {
                output_row(image, row, work);
                if (++row == y_.out) row = 0, ++image;
            }
        });
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
              sum(f.taps_.separable ? 0 : f.x_.out * f.step_),
              row(f.taps_.separable ? 0 : f.x_.out * f.step_),
              scratch(std::max(f.x_.out, f.held_) * f.step_),
              lanes(f.lane_ * f.stride_ * (f.step_ < kManyChannels ? f.step_ : 0)),
              phase(f.step_ < kManyChannels ? f.x_.out * f.step_ : 0),
              inputs(f.y_.taps),
              shifted(f.x_.taps),
              weights(std::max(f.x_.taps, f.y_.taps)) {}
    };

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
        if (taps_.separable) {
            for (int64_t j = 0; j < win.count; ++j) work.weights[j] = taps_.column[win.tap + j * y_.up];
            sum_rows(samples, work.inputs.data(), work.weights.data(), win.count, x_.in * step_, work.scratch.data());
            filter_row(out, taps_.row.data(), work);
            return;
        }
        std::fill(work.sum.begin(), work.sum.end(), Acc(0));
        for (int64_t j = 0; j < win.count; ++j) {
            const Acc one = 1;
            sum_rows_fixed<1, false>(samples, &work.inputs[j], &one, x_.in * step_);
            filter_row(work.row.data(), &taps_.all[(win.tap + j * y_.up) * x_.taps], work);
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
        if (step_ < kManyChannels && period_ == 1 && x_.taps * stride_ <= 32) return filter_and_pick(out, taps, work);
        if (step_ < kManyChannels) return filter_lanes(out, taps, work);
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

    // Downsampling, few channels: every sample is filtered, in whole vectors, and those that count are picked. Sorting the
    // samples first would take longer than what is computed in vain, but for long filters and large steps.
    template <class Out>
    void filter_and_pick(Out* out, const Acc* taps, Work& work) const {
        const Phase& phase = phases_[0];
        gather_taps(phase, work.held.data() + phase.shift * step_, taps, work);
        const int64_t length = ((x_.out - 1) * stride_ + 1) * step_;
        Acc* sums = work.lanes.data();
        sum_rows(sums, work.shifted.data(), work.weights.data(), phase.count, length, work.scratch.data());
        copy_samples(out, 1, sums, stride_, x_.out);
    }

    // Any period and stride, few channels: samples sorted into `stride` lanes make every phase one loop over a row.
    template <class Out>
    void filter_lanes(Out* out, const Acc* taps, Work& work) const {
        const Acc* held = work.held.data();
        if (stride_ > 1) {
            for (int64_t lane = 0; lane < stride_; ++lane) {
                const int64_t whole = at_least(at_most((held_ - 1 - lane) / stride_ + 1, lane_), 0);
                Acc* to = &work.lanes[lane * lane_ * step_];
                copy_samples(to, 1, held + lane * step_, stride_, whole);
                std::fill(to + whole * step_, to + lane_ * step_, Acc(0));
            }
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
            copy_samples(out + p * step_, period_, sums, 1, outputs);
        }
    }

    // `count` samples, of which every to_every-th, from_every-th is written, read.
    template <class Out>
    void copy_samples(Out* to, int64_t to_every, const Acc* from, int64_t from_every, int64_t count) const {
        if (step_ == 1) return copy_samples_of<1>(to, to_every, from, from_every, count);
        if (step_ == 3) return copy_samples_of<3>(to, 3 * to_every, from, 3 * from_every, count);  // images
        copy_samples_of<0>(to, step_ * to_every, from, step_ * from_every, count);
    }

    template <int Step, class Out>
    void copy_samples_of(Out* __restrict__ to, int64_t to_step, const Acc* __restrict__ from, int64_t from_step,
                         int64_t count) const {
        for (int64_t m = 0; m < count; ++m)
            for (int64_t i = 0; i < (Step ? Step : step_); ++i) store(&to[m * to_step + i], from[m * from_step + i]);
    }

    const Upfirdn2dCall& call_;
    const Taps<Acc>& taps_;
    const Axis x_, y_;
    const int64_t step_, images_;  // numbers of a sample that lie side by side; images (or planes)
    int64_t left_, held_, lane_, period_, stride_;  // zeros before a row in work; its length and a lane's, in samples
    std::vector<Phase> phases_;
    std::vector<Window> windows_;  // of every output row
};

// Templates cost seconds of the first build, so each dtype has those that networks use with it.
template <int Up, int Down, class Number>
bool run_four_taps(const Upfirdn2dCall& call, const float* column, const float* row) {
    if (call.channels_last) return FourTapPixels<Up, Down, Number>(call, column, row).run();
    if constexpr (std::is_same_v<Number, float>)
        if (FourTapNarrow<Up, Down, float>::serves(call)) return FourTapNarrow<Up, Down, float>(call, column, row).run();
    return FourTapPlanes<Up, Down, Number>(call, column, row).run();
}

template <class Number>
bool run(const Upfirdn2dCall& call) {
    using Acc = typename AccOf<Number>::type;
    const Taps<Acc> taps(reinterpret_cast<const Acc*>(call.f), call.fh, call.fw, call.flip, Acc(call.gain));
    const bool square = call.upx == call.upy && call.downx == call.downy;
    const bool four = taps.separable && taps.column.size() == 4 && taps.row.size() == 4;
    if constexpr (!std::is_same_v<Number, double>) {
        const float *column = taps.column.data(), *row = taps.row.data();
        if (square && four && (!call.channels_last || call.c >= kManyChannels)) {
            if (call.upx == 1 && call.downx == 1) return run_four_taps<1, 1, Number>(call, column, row);
            if (call.upx == 2 && call.downx == 1) return run_four_taps<2, 1, Number>(call, column, row);
            if (call.upx == 1 && call.downx == 2) return run_four_taps<1, 2, Number>(call, column, row);
        }
    }
    return Filter<Number>(call, taps).run();
}

template <class Number>
int status_of(const Upfirdn2dCall& call) {
    return run<Number>(call) ? kOk : kOutOfMemory;
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
            case kFloat32: return status_of<float>(call);
            case kFloat64: return status_of<double>(call);
            case kFloat16: return status_of<Float16>(call);
            case kBFloat16: return status_of<BFloat16>(call);
        }
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kBadDType;
}
