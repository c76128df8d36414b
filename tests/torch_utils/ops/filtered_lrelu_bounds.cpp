// Runs the CPU kernel of filtered_lrelu on random calls and compares it with plain loops. Meant to be compiled with
// -fsanitize=address,undefined: every buffer is exactly as large as promised. Prints how many calls agreed; exits with 1
// at the first that does not.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "filtered_lrelu.cpp"

using namespace refine;

static std::mt19937 rng(0);

static int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

template <class Number>
static std::vector<Number> random_numbers(int64_t count) {
    std::normal_distribution<double> normal;
    std::vector<Number> numbers(count);
    for (Number& number : numbers) store(&number, typename AccOf<Number>::type(normal(rng)));
    return numbers;
}

template <class T>
static int64_t address(std::vector<T>& v) {
    return reinterpret_cast<int64_t>(v.data());
}

// Tap (ky, kx) in correlation order.
template <class Acc>
static double tap(const std::vector<Acc>& f, int64_t height, int64_t width, int64_t ky, int64_t kx, bool flip) {
    const int64_t h = height ? height : width, y = flip ? ky : h - 1 - ky, x = flip ? kx : width - 1 - kx;
    return height ? double(f[y * width + x]) : double(f[y]) * double(f[x]);
}

template <class Number>
static void try_call(int64_t dtype) {
    using Acc = typename AccOf<Number>::type;
    FilteredLreluCall call = {};
    call.dtype = dtype;
    call.n = pick(1, 2), call.c = pick(1, 3), call.h = pick(1, 40), call.w = pick(1, 40);
    call.up = pick(1, 4), call.down = pick(1, 4), call.flip = pick(0, 1);
    call.fuw = pick(1, 13), call.fuh = pick(0, 1) ? pick(1, 13) : 0;
    call.fdw = pick(1, 13), call.fdh = pick(0, 1) ? pick(1, 13) : 0;
    const int64_t fuh = call.fuh ? call.fuh : call.fuw, fdh = call.fdh ? call.fdh : call.fdw;
    call.pad_x = pick(-3, 20), call.pad_y = pick(-3, 20), call.inset_x = pick(-3, 14), call.inset_y = pick(-3, 14);
    call.mid_w = pick(1, 90), call.mid_h = pick(1, 90);
    call.out_w = pick(1, 50), call.out_h = pick(1, 50);
    call.scale = 1.5, call.gain = 1.25, call.slope = 0.25, call.clamp = pick(0, 1) ? 1.0 : -1.0, call.threads = 2;
    auto x = random_numbers<Number>(call.n * call.c * call.h * call.w), b = random_numbers<Number>(call.c);
    auto fu = random_numbers<Acc>((call.fuh ? call.fuh : 1) * call.fuw);
    auto fd = random_numbers<Acc>((call.fdh ? call.fdh : 1) * call.fdw);
    if (call.fdh > 1 && pick(0, 1))  // rows that are equal in pairs
        for (int64_t i = 0; i < call.fdh * call.fdw; ++i) fd[(call.fdh - 1 - i / call.fdw) * call.fdw + i % call.fdw] = fd[i];
    std::vector<Number> y(call.n * call.c * call.out_h * call.out_w), again(y.size());
    int64_t a = call.up, e = call.down;
    while (e) std::swap(a %= e, e);
    const int64_t lanes = call.up / a * call.down, pair = 2 * kLanes<Acc>;
    const int64_t vectors = round_up(ceil_div(call.mid_w, lanes), pair) / kLanes<Acc>;
    std::vector<uint8_t> mask(call.n * call.c * call.mid_h * lanes * vectors * 2);
    call.x = address(x), call.b = address(b), call.fu = address(fu), call.fd = address(fd), call.mask = address(mask);
    call.y = address(y), call.step = kStepAndMask;
    int status = refine_filtered_lrelu(&call);
    call.y = address(again), call.step = kStepLrelu;
    status |= refine_filtered_lrelu(&call);
    if (status != kOk) std::printf("status %d\n", status), std::exit(1);
    const double tolerance = sizeof(Number) == 8 ? 1e-11 : sizeof(Number) == 4 ? 1e-4 : 2e-2;
    std::vector<double> mid(call.mid_h * call.mid_w);
    for (int64_t plane = 0; plane < call.n * call.c; ++plane) {
        for (int64_t i = 0; i < call.mid_h * call.mid_w; ++i) {
            double sum = 0;
            for (int64_t ky = 0; ky < fuh; ++ky) {
                for (int64_t kx = 0; kx < call.fuw; ++kx) {
                    const int64_t row = i / call.mid_w + ky - call.pad_y, col = i % call.mid_w + kx - call.pad_x;
                    if (row < 0 || col < 0 || row % call.up || col % call.up) continue;
                    if (row / call.up >= call.h || col / call.up >= call.w) continue;
                    const int64_t at = (plane * call.h + row / call.up) * call.w + col / call.up;
                    sum += tap(fu, call.fuh, call.fuw, ky, kx, call.flip) * (load(x[at]) + load(b[plane % call.c]));
                }
            }
            const double v = sum * call.scale * call.gain * (sum > 0 ? 1 : call.slope);
            mid[i] = call.clamp < 0 ? v : std::fmax(std::fmin(v, call.clamp), -call.clamp);
        }
        for (int64_t i = 0; i < call.out_h * call.out_w; ++i) {
            double sum = 0, size = 1;
            for (int64_t ky = 0; ky < fdh; ++ky) {
                for (int64_t kx = 0; kx < call.fdw; ++kx) {
                    const int64_t row = i / call.out_w * call.down + ky - call.inset_y;
                    const int64_t col = i % call.out_w * call.down + kx - call.inset_x;
                    if (row < 0 || col < 0 || row >= call.mid_h || col >= call.mid_w) continue;
                    const double term = tap(fd, call.fdh, call.fdw, ky, kx, call.flip) * mid[row * call.mid_w + col];
                    sum += term, size += std::fabs(term);
                }
            }
            const int64_t at = plane * call.out_h * call.out_w + i;
            const bool same = double(load(y[at])) == double(load(again[at]));
            if (!same || !(std::fabs(load(y[at]) - sum) <= tolerance * size)) {
                std::printf("number %zd is %g, again %g, expected %g\n", size_t(at), double(load(y[at])),
                            double(load(again[at])), sum);
                std::exit(1);
            }
        }
    }
    if (call.clamp >= 0) return;
    call.b = 0, call.y = address(y), call.step = kStepAndMask;  // what is linear in the mask agrees with itself
    status = refine_filtered_lrelu(&call);
    call.y = address(again), call.step = kStepByMask;
    status |= refine_filtered_lrelu(&call);
    for (size_t i = 0; i < y.size(); ++i)
        if (status || double(load(y[i])) != double(load(again[i]))) std::printf("by the mask: %zu\n", i), std::exit(1);
}

int main(int argc, char** argv) {
    const int calls = argc > 1 ? std::atoi(argv[1]) : 10;
    for (int i = 0; i < calls; ++i) {
        try_call<float>(kFloat32);
        try_call<double>(kFloat64);
        try_call<Float16>(kFloat16);
        try_call<BFloat16>(kBFloat16);
    }
    std::printf("%d calls agree\n", 4 * calls);
}
