// Bodies of upfirdn2d and bias_act, written once for the CPU and for CUDA. No torch, no Python.
//
// Conventions: images are dense, either planes (N, C, H, W) or pixels (N, H, W, C), called channels_last. Arithmetic is
// in `Acc`: double for double, float for everything smaller. Indices into tensors are 64 bits wide. A tap is stored in
// correlation order, i.e. already reversed where the caller asked for a convolution.

#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no headers, and the functions of <cmath> in the global namespace
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
namespace std {
using ::exp;
using ::expm1;
using ::fabs;
using ::log1p;
using ::tanh;
}  // namespace std
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define REFINE_FN __host__ __device__ inline
#else
#define REFINE_FN inline
#endif

namespace refine {

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

enum Status : int { kOk = 0, kBadDType = -1, kBadActivation = -2, kOutOfMemory = -3 };

// ---------------------------------------------------------------------------------------------------------------------
// Half-precision numbers as 16 bits.

REFINE_FN float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

REFINE_FN uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

REFINE_FN float load(float x) { return x; }
REFINE_FN double load(double x) { return x; }
REFINE_FN float load(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

REFINE_FN float load(Float16 x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#else
    // Exponent and mantissa move into place; multiplying by 2^112 rebiases the exponent, subnormals included.
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
    const float scaled = from_bits(rest) * from_bits(0x77800000u);
    const uint32_t special = from_bits(rest | 0x7f800000u) == from_bits(0x7f800000u) ? 0x7f800000u : 0x7fc00000u;
    return from_bits(sign | (rest >= 0x0f800000u ? special : to_bits(scaled)));
#endif
}

REFINE_FN void store(float* to, float x) { *to = x; }
REFINE_FN void store(double* to, double x) { *to = x; }

REFINE_FN void store(BFloat16* to, float x) {  // round to nearest, ties to even; a NaN stays one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    const uint32_t bits = to_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
#endif
}

REFINE_FN void store(Float16* to, float x) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Subnormal results: adding 0.5 lets the FPU round at the place of the last bit, 2^-24.
    const uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // 0x477ff000: the first that rounds to infinity
    to->bits = uint16_t(sign | (magnitude >= 0x477ff000u ? large : finite));
#endif
}

REFINE_FN int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }  // b > 0
REFINE_FN int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
REFINE_FN int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }
REFINE_FN int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};

// ---------------------------------------------------------------------------------------------------------------------
// bias_act: y = clamp(act(x + b) · gain, −clamp, +clamp) and its derivatives.

enum Activation : int64_t { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActivations };
constexpr int kAnyActivation = -1;  // CUDA: the call says which, the same for all threads

// One call, as the Python side packs it: eight bytes a field. The tensors are seen as (outer, channels, inner); without
// a bias channels is 1. order 0: y from x. 1: dx = dy · dy/dx, and db unless null. 2: g · dy · d²y/dx².
struct BiasActRecord {
    int64_t x, b, dy, g, out, db;  // addresses; null where not used
    int64_t partial;               // instead of db on CUDA: Acc[partial sums], see Points
    int64_t dtype, act, order;
    int64_t outer, channels, inner;
    double alpha, gain, clamp;  // clamp < 0: off
};

struct BiasActCall : BiasActRecord {
    int64_t threads;  // of OpenMP
};

template <class Acc>
REFINE_FN Acc sigmoid(Acc z) {
    return Acc(1) / (Acc(1) + std::exp(-z));
}

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

// act(z). Comparisons are written so that a NaN stays a NaN.
template <int A, class Acc>
REFINE_FN Acc act_value(Acc z, Acc alpha) {
    if (A == kRelu) return z < Acc(0) ? Acc(0) : z;
    if (A == kLrelu) return z > Acc(0) ? z : z * alpha;
    if (A == kTanh) return std::tanh(z);
    if (A == kSigmoid) return sigmoid(z);
    if (A == kElu) return z <= Acc(0) ? std::expm1(z) : z;
    if (A == kSelu) return Acc(kSeluScale) * (z <= Acc(0) ? Acc(kSeluAlpha) * std::expm1(z) : z);
    if (A == kSoftplus) return (z < Acc(0) ? Acc(0) : z) + std::log1p(std::exp(-std::fabs(z)));
    if (A == kSwish) return z * sigmoid(z);
    return z;
}

// act'(z); at the kinks the value that torch's own derivatives take.
template <int A, class Acc>
REFINE_FN Acc act_slope(Acc z, Acc alpha) {
    if (A == kRelu) return z <= Acc(0) ? Acc(0) : Acc(1);
    if (A == kLrelu) return z > Acc(0) ? Acc(1) : alpha;
    if (A == kTanh) {
        const Acc t = std::tanh(z);
        return Acc(1) - t * t;
    }
    if (A == kElu) return z <= Acc(0) ? std::exp(z) : Acc(1);
    if (A == kSelu) return Acc(kSeluScale) * (z <= Acc(0) ? Acc(kSeluAlpha) * std::exp(z) : Acc(1));
    if (A == kSigmoid || A == kSoftplus || A == kSwish) {
        const Acc s = sigmoid(z);
        if (A == kSoftplus) return s;
        return A == kSigmoid ? s * (Acc(1) - s) : s * (Acc(1) + z * (Acc(1) - s));
    }
    return Acc(1);
}

// act''(z); zero everywhere for linear, relu and lrelu.
template <int A, class Acc>
REFINE_FN Acc act_curve(Acc z) {
    if (A == kTanh) {
        const Acc t = std::tanh(z);
        return Acc(-2) * t * (Acc(1) - t * t);
    }
    if (A == kElu) return z <= Acc(0) ? std::exp(z) : Acc(0);
    if (A == kSelu) return z <= Acc(0) ? Acc(kSeluScale * kSeluAlpha) * std::exp(z) : Acc(0);
    if (A == kSigmoid || A == kSoftplus || A == kSwish) {
        const Acc s = sigmoid(z), ds = s * (Acc(1) - s);
        if (A == kSoftplus) return ds;
        return A == kSigmoid ? ds * (Acc(1) - Acc(2) * s) : ds * (Acc(2) + z * (Acc(1) - Acc(2) * s));
    }
    return Acc(0);
}

template <class Acc>
struct Epilogue {
    Acc alpha, gain, clamp;
};

// One element. `Order`, `A` and `Clamped` are compile-time, so a loop over this has no branches of its own.
template <int A, int Order, bool Clamped, class Acc>
REFINE_FN Acc bias_act_element(Acc z, Acc dy, Acc g, const Epilogue<Acc>& e) {
    if (Order == 0) {
        Acc y = act_value<A>(z, e.alpha) * e.gain;
        if (Clamped) {
            y = y < -e.clamp ? -e.clamp : y;
            y = y > e.clamp ? e.clamp : y;
        }
        return y;
    }
    if (Clamped) {  // the limits themselves still pass a gradient, as in torch.clamp
        const Acc y = act_value<A>(z, e.alpha) * e.gain;
        dy = std::fabs(y) <= e.clamp ? dy : Acc(0);
    }
    if (Order == 1) return dy * e.gain * act_slope<A>(z, e.alpha);
    return g * dy * e.gain * act_curve<A>(z);
}

// ---------------------------------------------------------------------------------------------------------------------
// bias_act on CUDA. Without db every thread takes packs of 16 bytes. With db a block covers a rectangle of numbers that
// share few biases and adds up what it writes: `partial` gets one number per block and column, which the caller sums.

constexpr int kPointThreads = 256;
constexpr int64_t kSumDepth = 16;  // numbers that a thread adds up

template <class Number>
struct Points {
    using Acc = typename AccOf<Number>::type;
    static constexpr int kPack = 16 / sizeof(Number);

    struct alignas(16) Pack {
        Number values[kPack];
    };

    const Number *x, *b, *dy, *g;
    Number* out;
    Acc* partial;
    int64_t outer, channels, inner, numbers;
    Epilogue<Acc> epilogue;
    int64_t act;
    bool clamped, aligned;

    REFINE_FN explicit Points(const BiasActRecord& call)
        : x(reinterpret_cast<const Number*>(call.x)),
          b(reinterpret_cast<const Number*>(call.b)),
          dy(reinterpret_cast<const Number*>(call.dy)),
          g(reinterpret_cast<const Number*>(call.g)),
          out(reinterpret_cast<Number*>(call.out)),
          partial(reinterpret_cast<Acc*>(call.partial)),
          outer(call.outer),
          channels(call.channels),
          inner(call.inner),
          numbers(call.outer * call.channels * call.inner),
          epilogue{Acc(call.alpha), Acc(call.gain), Acc(call.clamp)},
          act(call.act),
          clamped(call.clamp >= 0),
          aligned((call.x | call.dy | call.g | call.out) % 16 == 0) {}

    REFINE_FN int64_t packs() const { return (numbers + kPack - 1) / kPack; }

    // Rows: long stretches of one bias, 256 threads along each. Columns: 32 neighbouring numbers, 8 rows at a time.
    REFINE_FN bool by_rows() const { return inner >= 64; }
    REFINE_FN int sum_lanes() const { return by_rows() ? kPointThreads : kPointThreads / 32; }
    REFINE_FN int64_t row_numbers() const { return by_rows() ? inner : channels * inner; }
    REFINE_FN int64_t across() const {  // blocks beside each other
        return by_rows() ? ceil_div(inner, kPointThreads * kSumDepth) : ceil_div(row_numbers(), 32);
    }
    REFINE_FN int64_t down() const {
        return by_rows() ? outer * channels : ceil_div(outer, kPointThreads / 32 * kSumDepth);
    }
    REFINE_FN int64_t sum_blocks() const { return across() * down(); }

    REFINE_FN Acc bias(int64_t i) const {
        if (!b) return Acc(0);
        // 32-bit division is several times faster, and almost every tensor allows it.
        const int64_t c = i <= 0x7fffffff && inner <= 0x7fffffff ? int64_t(uint32_t(i) / uint32_t(inner)) : i / inner;
        return Acc(load(b[c <= 0x7fffffff ? int64_t(uint32_t(c) % uint32_t(channels)) : c % channels]));
    }
};

template <int A, int Order, class Acc>
REFINE_FN Acc point_element(bool clamped, Acc z, Acc dy, Acc g, const Epilogue<Acc>& e) {
    return clamped ? bias_act_element<A, Order, true>(z, dy, g, e) : bias_act_element<A, Order, false>(z, dy, g, e);
}

template <int Order, class Acc>
REFINE_FN Acc chosen_element(int64_t act, bool clamped, Acc z, Acc dy, Acc g, const Epilogue<Acc>& e) {
    switch (act) {
        case kRelu: return point_element<kRelu, Order>(clamped, z, dy, g, e);
        case kLrelu: return point_element<kLrelu, Order>(clamped, z, dy, g, e);
        case kTanh: return point_element<kTanh, Order>(clamped, z, dy, g, e);
        case kSigmoid: return point_element<kSigmoid, Order>(clamped, z, dy, g, e);
        case kElu: return point_element<kElu, Order>(clamped, z, dy, g, e);
        case kSelu: return point_element<kSelu, Order>(clamped, z, dy, g, e);
        case kSoftplus: return point_element<kSoftplus, Order>(clamped, z, dy, g, e);
        case kSwish: return point_element<kSwish, Order>(clamped, z, dy, g, e);
    }
    return point_element<kLinear, Order>(clamped, z, dy, g, e);
}

template <int A, int Order, class Number>
REFINE_FN typename AccOf<Number>::type point_value(const Points<Number>& p, Number x, Number dy_number, Number g_number,
                                                   typename AccOf<Number>::type b) {
    using Acc = typename AccOf<Number>::type;
    const Acc z = Acc(load(x)) + b, dy = Order > 0 ? Acc(load(dy_number)) : Acc(0);
    const Acc g = Order > 1 ? Acc(load(g_number)) : Acc(0);
    const auto& e = p.epilogue;
    if (A != kAnyActivation) return point_element<A, Order>(p.clamped, z, dy, g, e);
    return chosen_element<Order>(p.act, p.clamped, z, dy, g, e);
}

template <int A, int Order, class Number>
REFINE_FN void point_pack(const Points<Number>& p, int64_t index) {
    using Pack = typename Points<Number>::Pack;
    constexpr int size = Points<Number>::kPack;
    const int64_t first = index * size;
    if (!p.aligned || first + size > p.numbers) {
        for (int64_t i = first; i < first + size && i < p.numbers; ++i) {
            const Number dy = Order > 0 ? p.dy[i] : Number(), g = Order > 1 ? p.g[i] : Number();
            store(&p.out[i], point_value<A, Order>(p, p.x[i], dy, g, p.bias(i)));
        }
        return;
    }
    const Pack x = reinterpret_cast<const Pack*>(p.x)[index];
    Pack dy = {}, g = {}, out;
    if (Order > 0) dy = reinterpret_cast<const Pack*>(p.dy)[index];
    if (Order > 1) g = reinterpret_cast<const Pack*>(p.g)[index];
    const bool one_bias = p.inner % size == 0;
    const auto shared_bias = p.bias(first);
#ifdef __CUDA_ARCH__
#pragma unroll  // a pack stays in registers
#endif
    for (int i = 0; i < size; ++i) {
        const auto b = one_bias ? shared_bias : p.bias(first + i);
        store(&out.values[i], point_value<A, Order>(p, x.values[i], dy.values[i], g.values[i], b));
    }
    reinterpret_cast<Pack*>(p.out)[index] = out;
}

// dx of the thread's numbers, and their sum.
template <int A, class Number>
REFINE_FN typename AccOf<Number>::type sum_points(const Points<Number>& p, int64_t block, int thread) {
    using Acc = typename AccOf<Number>::type;
    const int64_t side = block % p.across(), line = block / p.across();
    Acc sum = Acc(0);
    if (p.by_rows()) {
        const Acc b = p.b ? Acc(load(p.b[line % p.channels])) : Acc(0);
        for (int64_t k = 0; k < kSumDepth; ++k) {
            const int64_t along = (side * kSumDepth + k) * kPointThreads + thread, i = line * p.inner + along;
            if (along >= p.inner) break;
            const Acc value = point_value<A, 1>(p, p.x[i], p.dy[i], Number(), b);
            store(&p.out[i], value);
            sum += value;
        }
        return sum;
    }
    const int64_t along = side * 32 + thread % 32, lanes = p.sum_lanes();
    if (along >= p.row_numbers()) return sum;
    const Acc b = p.b ? Acc(load(p.b[along / p.inner])) : Acc(0);
    for (int64_t k = 0; k < kSumDepth; ++k) {
        const int64_t row = (line * kSumDepth + k) * lanes + thread / 32, i = row * p.row_numbers() + along;
        if (row >= p.outer) break;
        const Acc value = point_value<A, 1>(p, p.x[i], p.dy[i], Number(), b);
        store(&p.out[i], value);
        sum += value;
    }
    return sum;
}

// One level of the tree over the lanes of a column: a barrier lies before each.
template <class Number, class Acc>
REFINE_FN void sum_halves(const Points<Number>& p, int thread, int half, Acc* shared) {
    const int columns = kPointThreads / p.sum_lanes();
    if (thread < half * columns) shared[thread] += shared[thread + half * columns];
}

// partial: (down, across) by rows, else (down, channels · inner).
template <class Number, class Acc>
REFINE_FN void sum_store(const Points<Number>& p, int64_t block, int thread, const Acc* shared) {
    if (p.by_rows()) {
        if (thread == 0) p.partial[block] = shared[0];
        return;
    }
    const int64_t along = block % p.across() * 32 + thread, line = block / p.across();
    if (thread < 32 && along < p.row_numbers()) p.partial[line * p.row_numbers() + along] = shared[thread];
}

// ---------------------------------------------------------------------------------------------------------------------
// upfirdn2d geometry.

// One call, as the Python side packs it: eight bytes a field.
struct Upfirdn2dRecord {
    int64_t x, f, y;  // addresses; f: Acc[fh · fw], or Acc[fw] applied along both axes when fh is 0
    int64_t dtype, channels_last;
    int64_t n, c, h, w, out_h, out_w;
    int64_t fh, fw, upx, upy, downx, downy, px0, py0, flip;
    double gain;
};

struct Upfirdn2dCall : Upfirdn2dRecord {
    int64_t threads;  // of OpenMP
};

// On CUDA: the outputs of a tile, the samples that it can need, and how many tiles there are.
struct TilesRecord : Upfirdn2dRecord {
    int64_t tile_h, tile_w, tile_c, held_h, held_w, tiles_x, tiles_y, tiles_c;
};

// One axis: sample i lies at i·up + pad of the padded image, output o reads the positions o·down … o·down + taps − 1.
struct Axis {
    int64_t in, out, taps, up, down, pad;
};

// The taps that meet samples: tap + j·up meets sample `first` + j.
struct Window {
    int64_t first, tap, count;
};

REFINE_FN int64_t first_sample(const Axis& a, int64_t o) { return ceil_div(o * a.down - a.pad, a.up); }

// Without regard to the ends of the image: `first` may be negative, the last sample beyond the end.
REFINE_FN Window unclipped_window(const Axis& a, int64_t o) {
    Window win;
    win.first = first_sample(a, o);
    win.tap = win.first * a.up + a.pad - o * a.down;
    win.count = win.tap < a.taps ? (a.taps - win.tap + a.up - 1) / a.up : 0;
    return win;
}

REFINE_FN Window window(const Axis& a, int64_t o) {
    Window win = unclipped_window(a, o);
    const int64_t skipped = at_least(-win.first, 0);
    win.first += skipped;
    win.tap += skipped * a.up;
    win.count = at_least(at_most(win.count - skipped, a.in - win.first), 0);
    return win;
}

// ---------------------------------------------------------------------------------------------------------------------
// upfirdn2d in tiles (CUDA): a block copies the samples that its outputs need into shared memory, waits, and filters
// them. The two phases are plain functions of (block, thread), so a host can run them thread by thread.

// Up, Down, Taps = 0: taken from the call. Pixels (channels_last) have their channels side by side in a tile.
template <int Up, int Down, int Taps>
struct Tiles {
    Axis x, y;
    int64_t n, c, tiles_x, tiles_y, tiles_c;
    int tile_h, tile_w, tile_c;  // outputs of a tile
    int held_h, held_w;          // samples that a tile can need
    bool channels_last, flip;

    REFINE_FN explicit Tiles(const TilesRecord& call)
        : x{call.w, call.out_w, call.fw, call.upx, call.downx, call.px0},
          y{call.h, call.out_h, call.fh, call.upy, call.downy, call.py0},
          n(call.n),
          c(call.c),
          tiles_x(call.tiles_x),
          tiles_y(call.tiles_y),
          tiles_c(call.tiles_c),
          tile_h(int(call.tile_h)),
          tile_w(int(call.tile_w)),
          tile_c(int(call.tile_c)),
          held_h(int(call.held_h)),
          held_w(int(call.held_w)),
          channels_last(call.channels_last != 0),
          flip(call.flip != 0) {}

    REFINE_FN int up_x() const { return Up ? Up : int(x.up); }
    REFINE_FN int up_y() const { return Up ? Up : int(y.up); }
    REFINE_FN int down_x() const { return Down ? Down : int(x.down); }
    REFINE_FN int down_y() const { return Down ? Down : int(y.down); }
    REFINE_FN int taps_x() const { return Taps ? Taps : int(x.taps); }
    REFINE_FN int taps_y() const { return Taps ? Taps : int(y.taps); }
    REFINE_FN int64_t blocks() const { return n * tiles_c * tiles_y * tiles_x; }
    REFINE_FN int64_t held() const { return int64_t(held_h) * held_w * tile_c; }
    REFINE_FN int64_t shared_numbers() const { return held() + int64_t(taps_x()) * taps_y(); }
    REFINE_FN int64_t at(int64_t image, int64_t channel, int64_t row, int64_t col, int64_t h, int64_t w) const {
        return channels_last ? ((image * h + row) * w + col) * c + channel : ((image * c + channel) * h + row) * w + col;
    }
};

struct Tile {
    int64_t image, channel, out_y, out_x, in_y, in_x;  // first of each
};

template <class T>
REFINE_FN Tile tile_of(const T& t, int64_t block) {
    Tile tile;
    tile.out_x = block % t.tiles_x * t.tile_w;
    block /= t.tiles_x;
    tile.out_y = block % t.tiles_y * t.tile_h;
    block /= t.tiles_y;
    tile.channel = block % t.tiles_c * t.tile_c;
    tile.image = block / t.tiles_c;
    tile.in_x = first_sample(t.x, tile.out_x);
    tile.in_y = first_sample(t.y, tile.out_y);
    return tile;
}

// Shared memory: held_h × held_w × tile_c samples, then the taps in correlation order, gain included.
template <class T, class Number, class Acc>
REFINE_FN void tile_load(const T& t, int64_t block, int thread, int threads, const Number* x, const Acc* f, Acc gain,
                         Acc* shared) {
    const Tile tile = tile_of(t, block);
    const int held = int(t.held()), taps = t.taps_x() * t.taps_y();
    for (int i = thread; i < held; i += threads) {
        const int channel = i % t.tile_c, pixel = i / t.tile_c;
        const int64_t row = tile.in_y + pixel / t.held_w, col = tile.in_x + pixel % t.held_w, c = tile.channel + channel;
        const bool inside = row >= 0 && row < t.y.in && col >= 0 && col < t.x.in && c < t.c;
        shared[i] = inside ? Acc(load(x[t.at(tile.image, c, row, col, t.y.in, t.x.in)])) : Acc(0);
    }
    for (int i = thread; i < taps; i += threads) shared[held + i] = f[t.flip ? i : taps - 1 - i] * gain;
}

template <class T, class Number, class Acc>
REFINE_FN void tile_filter(const T& t, int64_t block, int thread, int threads, const Acc* shared, Number* y) {
    const Tile tile = tile_of(t, block);
    const Acc* f = shared + t.held();
    const int outputs = t.tile_h * t.tile_w * t.tile_c;
    // From the tile's first sample to its first output, in the padded image; −up < begin ≤ 0. What follows is small.
    const int begin_y = int(tile.out_y * t.down_y() - t.y.pad - tile.in_y * t.up_y());
    const int begin_x = int(tile.out_x * t.down_x() - t.x.pad - tile.in_x * t.up_x());
    for (int i = thread; i < outputs; i += threads) {
        const int channel = i % t.tile_c, pixel = i / t.tile_c;
        const int in_row = pixel / t.tile_w, in_col = pixel - in_row * t.tile_w;
        const int64_t row = tile.out_y + in_row, col = tile.out_x + in_col;
        if (row >= t.y.out || col >= t.x.out || tile.channel + channel >= t.c) continue;
        const int at_y = begin_y + in_row * t.down_y(), at_x = begin_x + in_col * t.down_x();
        const int first_y = (at_y + t.up_y() - 1) / t.up_y(), first_x = (at_x + t.up_x() - 1) / t.up_x();
        const int tap_y = first_y * t.up_y() - at_y, tap_x = first_x * t.up_x() - at_x;
        const Acc* corner = shared + (first_y * t.held_w + first_x) * t.tile_c + channel;
        Acc sum = Acc(0);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int ky = 0; ky < (t.taps_y() + t.up_y() - 1) / t.up_y(); ++ky) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
            for (int kx = 0; kx < (t.taps_x() + t.up_x() - 1) / t.up_x(); ++kx) {
                const int fy = tap_y + ky * t.up_y(), fx = tap_x + kx * t.up_x();
                // Only a last tap can be missing, and never where `up` divides the number of taps.
                if (fy < t.taps_y() && fx < t.taps_x())
                    sum += f[fy * t.taps_x() + fx] * corner[(ky * t.held_w + kx) * t.tile_c];
            }
        }
        store(&y[t.at(tile.image, tile.channel + channel, row, col, t.y.out, t.x.out)], sum);
    }
}

constexpr int kTileThreads = 256;

// Filters too large for a tile: one output straight from memory.
template <class Number, class Acc>
REFINE_FN void direct_output(const Upfirdn2dRecord& call, int64_t index, const Number* x, const Acc* f, Number* y) {
    const Axis ax = {call.w, call.out_w, call.fw, call.upx, call.downx, call.px0};
    const Axis ay = {call.h, call.out_h, call.fh, call.upy, call.downy, call.py0};
    int64_t rest = index, channel = 0;
    if (call.channels_last) {
        channel = rest % call.c;
        rest /= call.c;
    }
    const int64_t col = rest % ax.out, row = rest / ax.out % ay.out;
    rest /= ax.out * ay.out;  // image, or image · c + channel
    const Window wx = window(ax, col), wy = window(ay, row);
    const int64_t step = call.channels_last ? call.c : 1;
    Acc sum = Acc(0);
    for (int64_t j = 0; j < wy.count; ++j) {
        for (int64_t i = 0; i < wx.count; ++i) {
            const int64_t tap = (wy.tap + j * ay.up) * ax.taps + wx.tap + i * ax.up;
            const int64_t from = ((rest * ay.in + wy.first + j) * ax.in + wx.first + i) * step + channel;
            sum += f[call.flip ? tap : ax.taps * ay.taps - 1 - tap] * Acc(load(x[from]));
        }
    }
    store(&y[index], sum * Acc(call.gain));
}

}  // namespace refine
