// Runs the CPU kernels, and the phases of the CUDA kernels thread by thread, on random calls, and compares both with a
// plain loop. Meant to be compiled with -fsanitize=address,undefined: every buffer is exactly as large as promised.
// Prints how many calls agreed; exits with 1 at the first that does not.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "bias_act.cpp"
#include "upfirdn2d.cpp"

using namespace refine;

static std::mt19937 rng(0);

static int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

template <class Number>
static std::vector<Number> random_numbers(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<Number> numbers(count);
    for (Number& number : numbers) store(&number, typename AccOf<Number>::type(normal(rng)));
    return numbers;
}

template <class T>
static int64_t address(const std::vector<T>& v) {
    return reinterpret_cast<int64_t>(v.data());
}

template <class Number>
static double tolerance() {
    return sizeof(Number) == 8 ? 1e-12 : sizeof(Number) == 4 ? 2e-5 : 5e-2;
}

template <class Number>
static void compare(const char* what, const std::vector<Number>& a, const std::vector<Number>& b) {
    for (size_t i = 0; i < a.size(); ++i) {
        const double x = load(a[i]), y = load(b[i]);
        if (!(std::fabs(x - y) <= tolerance<Number>() * std::max({1.0, std::fabs(x), std::fabs(y)}))) {
            std::printf("%s: number %zu is %g, expected %g\n", what, i, y, x);
            std::exit(1);
        }
    }
}

// Samples that `outputs` neighbouring outputs can need along an axis, as in _plan_launch of upfirdn2d.py.
static int64_t held_along(int64_t outputs, int64_t down, int64_t taps, int64_t up) {
    return ((outputs - 1) * down + taps - 1) / up + 2;
}

template <int Up, int Down, int Taps, class Number>
static void replay_tiles(const Upfirdn2dCall& call) {
    using Acc = typename AccOf<Number>::type;
    TilesRecord record;
    static_cast<Upfirdn2dRecord&>(record) = call;
    record.tile_h = pick(1, 32), record.tile_w = pick(1, 32), record.tile_c = call.channels_last ? pick(1, call.c) : 1;
    record.held_h = held_along(record.tile_h, call.downy, call.fh, call.upy);
    record.held_w = held_along(record.tile_w, call.downx, call.fw, call.upx);
    record.tiles_y = ceil_div(call.out_h, record.tile_h), record.tiles_x = ceil_div(call.out_w, record.tile_w);
    record.tiles_c = ceil_div(call.c, record.tile_c);
    const Tiles<Up, Down, Taps> tiles(record);
    for (int64_t block = 0; block < tiles.blocks(); ++block) {
        std::unique_ptr<Acc[]> shared(new Acc[tiles.shared_numbers()]);
        for (int thread = 0; thread < kTileThreads; ++thread)
            tile_load(tiles, block, thread, kTileThreads, reinterpret_cast<const Number*>(call.x),
                      reinterpret_cast<const Acc*>(call.f), Acc(call.gain), shared.get());
        for (int thread = 0; thread < kTileThreads; ++thread)
            tile_filter(tiles, block, thread, kTileThreads, shared.get(), reinterpret_cast<Number*>(call.y));
    }
}

template <class Number>
static void try_upfirdn2d(int64_t dtype, bool frequent) {
    using Acc = typename AccOf<Number>::type;
    Upfirdn2dCall call = {};
    call.dtype = dtype;
    call.channels_last = pick(0, 1);
    call.n = pick(1, 2), call.c = pick(0, 9) ? pick(1, 6) : 40, call.h = pick(1, 40), call.w = pick(1, 40);
    const int64_t kind = frequent ? pick(0, 2) : -1;
    call.upx = call.upy = kind == 1 ? 2 : 1;
    call.downx = call.downy = kind == 2 ? 2 : 1;
    call.fh = call.fw = 4;
    if (!frequent) {
        call.upx = pick(1, 4), call.upy = pick(1, 4), call.downx = pick(1, 4), call.downy = pick(1, 4);
        call.fh = pick(0, 30) ? pick(1, 9) : 130, call.fw = pick(0, 30) ? pick(1, 9) : 120;
    }
    call.px0 = pick(-3, 8), call.py0 = pick(-3, 8);
    const int64_t wide = call.w * call.upx + call.px0 + pick(-3, 8) - call.fw;
    const int64_t high = call.h * call.upy + call.py0 + pick(-3, 8) - call.fh;
    if (wide < 0 || high < 0) return;
    call.out_w = wide / call.downx + 1, call.out_h = high / call.downy + 1;
    call.flip = pick(0, 1), call.gain = 1.5, call.threads = pick(1, 2);
    const auto x = random_numbers<Number>(call.n * call.c * call.h * call.w);
    auto f = random_numbers<Acc>(call.fh * call.fw);
    if (pick(0, 1))  // of rank one
        for (int64_t i = 0; i < call.fh * call.fw; ++i) f[i] = f[i / call.fw] * f[i % call.fw];
    const int64_t numbers = call.n * call.c * call.out_h * call.out_w;
    std::vector<Number> expected(numbers), cpu(numbers), tiled(numbers);
    call.x = address(x), call.f = address(f), call.y = address(cpu);
    for (int64_t i = 0; i < numbers; ++i) direct_output(call, i, x.data(), f.data(), expected.data());
    if (refine_upfirdn2d(&call) != kOk) std::exit(1);
    compare("upfirdn2d on the CPU", expected, cpu);
    call.y = address(tiled);
    if (kind == 0) replay_tiles<1, 1, 4, Number>(call);
    if (kind == 1) replay_tiles<2, 1, 4, Number>(call);
    if (kind == 2) replay_tiles<1, 2, 4, Number>(call);
    if (kind < 0) replay_tiles<0, 0, 0, Number>(call);
    compare("upfirdn2d in tiles", expected, tiled);
}

template <int A, class Number>
static void replay_points(const BiasActCall& call) {
    using Acc = typename AccOf<Number>::type;
    const Points<Number> points(call);
    if (!call.partial) {
        for (int64_t i = 0; i < points.packs(); ++i) {
            if (call.order == 0) point_pack<A, 0>(points, i);
            if (call.order == 1) point_pack<A, 1>(points, i);
            if (call.order == 2) point_pack<A, 2>(points, i);
        }
        return;
    }
    for (int64_t block = 0; block < points.sum_blocks(); ++block) {
        std::unique_ptr<Acc[]> shared(new Acc[kPointThreads]);
        for (int t = 0; t < kPointThreads; ++t) shared[t] = sum_points<A>(points, block, t);
        for (int half = points.sum_lanes() / 2; half > 0; half /= 2)
            for (int t = 0; t < kPointThreads; ++t) sum_halves(points, t, half, shared.get());
        for (int t = 0; t < kPointThreads; ++t) sum_store(points, block, t, shared.get());
    }
}

template <class Number>
static void try_bias_act(int64_t dtype) {
    using Acc = typename AccOf<Number>::type;
    BiasActCall call = {};
    call.dtype = dtype, call.act = pick(0, kActivations - 1), call.order = pick(0, 2);
    call.outer = pick(1, 40), call.channels = pick(1, 40), call.inner = pick(0, 1) ? pick(1, 40) : pick(1, 1500);
    if (pick(0, 9) == 0) call.outer = pick(1, 400), call.inner = 1;
    call.alpha = 0.2, call.gain = 1.4, call.clamp = pick(0, 1) ? 0.9 : -1, call.threads = pick(1, 2);
    const int64_t numbers = call.outer * call.channels * call.inner;
    const auto x = random_numbers<Number>(numbers), dy = random_numbers<Number>(numbers);
    const auto g = random_numbers<Number>(numbers), b = random_numbers<Number>(call.channels);
    std::vector<Number> cpu(numbers), replayed(numbers), db(call.channels);
    const bool with_db = call.order == 1 && pick(0, 1);
    call.x = address(x), call.b = address(b), call.out = address(cpu);
    call.dy = call.order > 0 ? address(dy) : 0, call.g = call.order > 1 ? address(g) : 0;
    call.db = with_db ? address(db) : 0;
    if (refine_bias_act(&call) != kOk) std::exit(1);
    // As _partial_size in bias_act.py.
    const bool rows = call.inner >= 64;
    const int64_t down = rows ? call.outer : ceil_div(call.outer, 128), across = rows ? ceil_div(call.inner, 4096) : call.inner;
    std::vector<Acc> partial(with_db ? down * call.channels * across : 0);
    call.out = address(replayed), call.db = 0, call.partial = with_db ? address(partial) : 0;
    call.act == kLrelu ? replay_points<kLrelu, Number>(call) : replay_points<kAnyActivation, Number>(call);
    compare("bias_act", cpu, replayed);
    if (!with_db) return;
    std::vector<double> sums(call.channels);
    for (size_t i = 0; i < partial.size(); ++i) sums[i / across % call.channels] += double(partial[i]);
    std::vector<Number> expected(call.channels);
    for (int64_t c = 0; c < call.channels; ++c) store(&expected[c], Acc(sums[c]));
    compare("db", expected, db);
}

static void check_halves() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const Float16 half = {uint16_t(bits)};
        const BFloat16 brain = {uint16_t(bits)};
        Float16 half_again;
        BFloat16 brain_again;
        store(&half_again, load(half));
        store(&brain_again, load(brain));
        const bool half_nan = (bits & 0x7fff) > 0x7c00, brain_nan = (bits & 0x7fff) > 0x7f80;
        if (half_nan ? load(half_again) == load(half_again) : half_again.bits != half.bits) std::exit(1);
        if (brain_nan ? load(brain_again) == load(brain_again) : brain_again.bits != brain.bits) std::exit(1);
    }
}

int main(int argc, char** argv) {
    const int calls = argc > 1 ? std::atoi(argv[1]) : 100;
    check_halves();
    for (int i = 0; i < calls; ++i) {
        const bool frequent = i % 2;
        try_upfirdn2d<float>(kFloat32, frequent), try_bias_act<float>(kFloat32);
        try_upfirdn2d<double>(kFloat64, frequent), try_bias_act<double>(kFloat64);
        try_upfirdn2d<Float16>(kFloat16, frequent), try_bias_act<Float16>(kFloat16);
        try_upfirdn2d<BFloat16>(kBFloat16, frequent), try_bias_act<BFloat16>(kBFloat16);
    }
    std::printf("%d calls agree\n", 8 * calls);
    return 0;
}
