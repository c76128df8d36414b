// 3×3 convolution of float32 images, stride 1, padding 1, on the CPU, and its gradient to the weights, by winograd.h.
//
// Work goes in blocks of tiles that stay in the second-level cache: samples → V, at each of the 36 points a product of
// matrices V · U → M, M → outputs; the weights → U once a call. Vectors run along the channels. Images in planes are
// turned into pixels a strip, i.e. one row of tiles, at a time. No sum depends on the number of threads.

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "products.h"
#include "scratch.h"
#include "winograd.h"

namespace refine {
namespace {

using namespace winograd;

// All of these are measured; results do not depend on them but for the rounding of sums over tiles.
constexpr int64_t kBlockBytes = 384 << 10;        // of V and M, which then share the second-level cache
constexpr int64_t kLeastTiles = 64;               // of a block
constexpr int64_t kCachedWeightBytes = 1 << 20;   // of U. If it is larger …
constexpr int64_t kLeastTilesPerRead = 128;       // … a block is, too: each reads all of U from memory
constexpr int64_t kWeightBytes = 8 << 20;         // of U; more outputs are served in turns. And where …
constexpr int64_t kFewTiles = 64;                 // … so few share it, turns are so short that U is cached
constexpr int64_t kGroupBytes = 4 << 20;          // of sums of weight gradients, of …
constexpr int64_t kMostGroups = 8;                // … that many groups of blocks
constexpr int64_t kDepth = 256;                   // channels of a product: a panel of U fits the first-level cache

// One call, as the Python side packs it: eight bytes a field.
struct Conv3x3Call {
    int64_t x, w, b, y;          // addresses; b may be 0
    int64_t weight_grad;         // 0: y = x ∗ w + b. 1: y is the gradient to the outputs, w becomes that to the weights
    int64_t x_pixels, y_pixels;  // layouts: 1 = channels_last
    int64_t n, c, k, h, width;   // images, channels of x and of y, size
    int64_t wk, wc, wy, wx;      // strides of w in numbers; those of a kernel that is turned are negative
    int64_t threads;
};

// A (rows × columns) matrix for each point. Strides that are multiples of a large power of two would fold all of them
// onto the same lines of a cache.
struct Matrices {
    int64_t row, point;
    Matrices(int64_t rows, int64_t columns)
        : row(round_up(columns, kPanel) + (round_up(columns, kPanel) % 128 ? 0 : kPanel)), point(rows * row + kPanel) {}
    int64_t numbers() const { return kPoints * point; }
};

struct Image {
    float* data;
    bool pixels;
    int64_t channels, h, w;
    float* row(int64_t image, int64_t y) const { return data + (image * h + y) * w * channels; }
    float* plane_row(int64_t image, int64_t channel, int64_t y) const {
        return data + ((image * channels + channel) * h + y) * w;
    }
};

// `count` things shared out among workers, whoever runs them.
struct Share {
    int64_t first, end;
    Share(int64_t count, int64_t worker, int64_t workers)
        : first(count * worker / workers), end(count * (worker + 1) / workers) {}
};

class Convolution {
public:
    explicit Convolution(const Conv3x3Call& call)
        : call_(call),
          x_{reinterpret_cast<float*>(call.x), call.x_pixels != 0, call.c, call.h, call.width},
          y_{reinterpret_cast<float*>(call.y), call.y_pixels != 0, call.k, call.h, call.width},
          threads_(at_least(call.threads, 1)),
          tiles_x_(ceil_div(call.width, kTile)),
          tiles_y_(ceil_div(call.h, kTile)),
          strips_(call.n * tiles_y_),
          outputs_(outputs_of_a_turn()),
          block_(at_least(at_most(tiles_of_a_block() / tiles_x_, strips_), 1)),
          blocks_(ceil_div(strips_, block_)),
          v_(block_ * tiles_x_, call.c),
          m_(block_ * tiles_x_, call.weight_grad ? call.k : outputs_),
          zeros_(at_least(call.c, call.k) * call.width) {
        std::fill_n(zeros_.data(), at_least(call.c, call.k) * call.width, 0.f);
    }

    void run() const {
        if (call_.weight_grad)
            weight_grad();
        else
            forward();
    }

private:
    int64_t outputs_of_a_turn() const {
        const int64_t bytes = strips_ * tiles_x_ <= kFewTiles ? kCachedWeightBytes : kWeightBytes;
        const int64_t panels = at_least(bytes / (kPoints * 4 * kPanel * call_.c), 1);
        return at_most(panels * kPanel, call_.k);
    }
    int64_t tiles_of_a_block() const {
        const bool cached = kPoints * 4 * call_.c * call_.k <= kCachedWeightBytes;
        return at_least(kBlockBytes / (kPoints * 4 * (call_.c + outputs_)), cached ? kLeastTiles : kLeastTilesPerRead);
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Images → matrices.

    int64_t strip_width() const { return tiles_x_ * kTile + 2; }
    int64_t strip_row(int64_t channels) const { return round_up(strip_width() * channels, 16) + 16; }

    // What one worker needs to turn strips of an image into matrices or matrices into strips.
    struct Strip {
        Buffer pixels, columns;
        Strip(const Convolution& c, int64_t channels)
            : pixels(kPatch * c.strip_width() * round_up(channels, 8)), columns(kPatch * c.strip_row(channels)) {}
    };
    std::vector<Strip> strips_for(int64_t workers, int64_t channels) const {
        std::vector<Strip> strips;
        for (int64_t i = 0; i < workers; ++i) strips.emplace_back(*this, channels);
        return strips;
    }

    // Rows y0 … of an image as pixels: where they lie, or in `strip`; zeros outside.
    void find_rows(const Image& image, int64_t n, int64_t y0, int count, const Strip& strip, const float** rows) const {
        for (int i = 0; i < count; ++i) {
            const int64_t y = y0 + i;
            if (y < 0 || y >= image.h) {
                rows[i] = zeros_.data();
            } else if (image.pixels) {
                rows[i] = image.row(n, y);
            } else {
                float* to = strip.pixels.data() + i * image.w * image.channels;
                transpose(image.plane_row(n, 0, y), image.h * image.w, to, image.channels, image.channels, image.w);
                rows[i] = to;
            }
        }
    }

    // A strip → its tiles' rows of the matrices at `out`, by Transform along both axes, first along the columns.
    // In: samples along an axis that a tile reads, `left` of them to the left of its outputs.
    template <int In, void (*Transform)(const V8*, V8*)>
    void transform_strip(const Image& image, int64_t index, int left, const Matrices& matrices, float* out,
                         const Strip& strip) const {
        const int64_t channels = image.channels, size = image.w * channels, stride = strip_row(channels);
        const float* rows[In];
        find_rows(image, index / tiles_y_, index % tiles_y_ * kTile - left, In, strip, rows);
        float* columns = strip.columns.data();
        const auto down = [&](int64_t i, int64_t count) {
            V8 in[In], values[kPatch];
            if (count == 8) {
                REFINE_UNROLL for (int r = 0; r < In; ++r) in[r] = load8(rows[r] + i);
            } else {
                REFINE_UNROLL for (int r = 0; r < In; ++r) in[r] = load_few(rows[r] + i, count);
            }
            Transform(in, values);
            float* to = columns + left * channels + i;
            REFINE_UNROLL for (int r = 0; r < kPatch; ++r) store8(to + r * stride, values[r]);
        };
        int64_t i = 0;
        for (; i + 8 <= size; i += 8) down(i, 8);
        if (i < size) down(i, size - i);
        for (int r = 0; r < kPatch; ++r) {
            float* row = columns + r * stride;
            std::fill(row, row + left * channels, 0.f);
            std::fill(row + left * channels + size, row + strip_width() * channels, 0.f);
        }
        for (int64_t tile = 0; tile < tiles_x_; ++tile) {
            for (int64_t c = 0; c < channels; c += 8) {
                const float* from = columns + tile * kTile * channels + c;
                float* to = out + tile * matrices.row + c;
                for (int r = 0; r < kPatch; ++r, from += stride, to += kPatch * matrices.point) {
                    V8 in[In], values[kPatch];
                    REFINE_UNROLL for (int j = 0; j < In; ++j) in[j] = load8(from + j * channels);
                    Transform(in, values);
                    REFINE_UNROLL for (int j = 0; j < kPatch; ++j) store8(to + j * matrices.point, values[j]);
                }
            }
        }
    }

    static V8 load_few(const float* from, int64_t count) {
        V8 v = {};
        memcpy(&v, from, count * sizeof(float));
        return v;
    }

    void samples(int64_t strip, float* v, const Strip& work) const {
        transform_strip<kPatch, transform_samples<V8>>(x_, strip, 1, v_, v, work);
    }

    void output_grads(int64_t strip, float* d, const Strip& work) const {
        transform_strip<kTile, transform_outputs<V8>>(y_, strip, 0, m_, d, work);
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Weights ↔ matrices. U: at each point panels of (channels × kPanel outputs).

    int64_t u_point() const { return ceil_div(outputs_, kPanel) * call_.c * kPanel + kPanel; }

    bool is_of_planes() const { return call_.wc == 9 && call_.wy == 3 && call_.wx == 1; }

    static constexpr int64_t kPart = 64;  // channels of a panel that a thread takes at once

    void transform_weights(int64_t k, int64_t panels, float* u) const {
        const int64_t parts = ceil_div(call_.c, kPart);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
        for (int64_t i = 0; i < panels * parts; ++i) {
            const int64_t panel = i / parts, c = i % parts * kPart;
            transform_part(k + panel * kPanel, c, at_most(c + kPart, call_.c), u + panel * call_.c * kPanel);
        }
    }

    void transform_part(int64_t k, int64_t first, int64_t end, float* u) const {
        constexpr int kSome = 8;  // channels that are read at once
        float taps[kSome * 9 * kPanel] = {};
        for (int64_t c = first; c < end; ++c) {
            if (c % kSome == 0) load_taps(k, c, at_most(end - c, kSome), taps);
            for (int half = 0; half < kPanel; half += 8) {
                const float* from = taps + c % kSome * 9 * kPanel + half;
                V8 columns[kPatch][3];
                REFINE_UNROLL for (int x = 0; x < 3; ++x) {
                    V8 in[3], out[kPatch];
                    REFINE_UNROLL for (int y = 0; y < 3; ++y) in[y] = load8(from + (y * 3 + x) * kPanel);
                    transform_taps(in, out);
                    REFINE_UNROLL for (int r = 0; r < kPatch; ++r) columns[r][x] = out[r];
                }
                float* to = u + c * kPanel + half;
                for (int r = 0; r < kPatch; ++r, to += kPatch * u_point()) {
                    V8 out[kPatch];
                    transform_taps(columns[r], out);
                    REFINE_UNROLL for (int j = 0; j < kPatch; ++j) store8(to + j * u_point(), out[j]);
                }
            }
        }
    }

    // Weights of outputs k …, channels c … → (channels × 9 × kPanel). Four layouts occur: of planes or pixels, and either
    // with outputs and channels exchanged, as the gradient to x has them.
    void load_taps(int64_t k, int64_t c, int64_t channels, float* taps) const {
        const float* w = reinterpret_cast<const float*>(call_.w) + k * call_.wk + c * call_.wc;
        const int64_t outputs = at_most(call_.k - k, kPanel);
        if (is_of_planes()) return transpose(w, call_.wk, taps, kPanel, outputs, channels * 9);
        for (int tap = 0; tap < 9; ++tap) {
            const float* from = w + tap / 3 * call_.wy + tap % 3 * call_.wx;
            float* to = taps + tap * kPanel;
            if (call_.wc == 1) {
                transpose(from, call_.wk, to, 9 * kPanel, outputs, channels);
            } else if (call_.wk == 1) {
                for (int64_t i = 0; i < channels; ++i) std::copy_n(from + i * call_.wc, outputs, to + i * 9 * kPanel);
            } else {
                for (int64_t i = 0; i < channels; ++i)
                    for (int64_t j = 0; j < outputs; ++j) to[i * 9 * kPanel + j] = from[i * call_.wc + j * call_.wk];
            }
        }
    }

    void store_weights(const float* s, const Matrices& sums, int64_t k) const {
        float* w = reinterpret_cast<float*>(call_.w) + k * call_.wk;
        for (int64_t c = 0; c < call_.c; c += 8) {
            const float* from = s + c;
            V8 columns[3][kPatch];
            REFINE_UNROLL for (int j = 0; j < kPatch; ++j) {
                V8 in[kPatch], out[3];
                REFINE_UNROLL for (int r = 0; r < kPatch; ++r) in[r] = load8(from + (r * kPatch + j) * sums.point);
                gather_taps(in, out);
                REFINE_UNROLL for (int y = 0; y < 3; ++y) columns[y][j] = out[y];
            }
            V8 values[9];
            REFINE_UNROLL for (int y = 0; y < 3; ++y) gather_taps(columns[y], values + 3 * y);
            store_taps(values, w + c * call_.wc, at_most(call_.c - c, 8));
        }
    }

    void store_taps(const V8* values, float* w, int64_t channels) const {
        if (channels == 8 && is_of_planes()) {  // eight taps of eight channels at once
            V8 some[8];
            REFINE_UNROLL for (int i = 0; i < 8; ++i) some[i] = values[i];
            transpose8(some);
            REFINE_UNROLL for (int i = 0; i < 8; ++i) store8(w + i * 9, some[i]);
            for (int i = 0; i < 8; ++i) w[i * 9 + 8] = values[8][i];
            return;
        }
        for (int tap = 0; tap < 9; ++tap) {
            float* to = w + tap / 3 * call_.wy + tap % 3 * call_.wx;
            if (channels == 8 && call_.wc == 1) {
                store8(to, values[tap]);
            } else {
                for (int64_t i = 0; i < channels; ++i) to[i * call_.wc] = values[tap][i];
            }
        }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Forward.

    void forward() const {
        const Buffer u(kPoints * u_point());
        const bool alone = threads_ == 1 || blocks_ >= threads_;  // a block a worker; few blocks are shared
        const int64_t workers = alone ? at_most(threads_, blocks_) : 1;
        std::vector<Buffer> v, m;
        for (int64_t i = 0; i < workers; ++i) v.emplace_back(v_.numbers()), m.emplace_back(m_.numbers());
        const auto in = strips_for(threads_, call_.c), out = strips_for(threads_, outputs_);
        for (int64_t k = 0; k < call_.k; k += outputs_) {
            const int64_t panels = ceil_div(at_most(call_.k - k, outputs_), kPanel);
            transform_weights(k, panels, u.data());
            if (alone) {
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(static, 1)
                for (int64_t worker = 0; worker < workers; ++worker) {
                    const Share share(blocks_, worker, workers);
                    for (int64_t i = share.first; i < share.end; ++i)
                        forward_block(i, k, u.data(), v[worker].data(), m[worker].data(), &in[worker], &out[worker], 1);
                }
            } else {
                for (int64_t block = 0; block < blocks_; ++block)
                    forward_block(block, k, u.data(), v[0].data(), m[0].data(), in.data(), out.data(), threads_);
            }
        }
    }

    void forward_block(int64_t block, int64_t k, const float* u, float* v, float* m, const Strip* in, const Strip* out,
                       int64_t workers) const {
        const int64_t first = block * block_, strips = at_most(strips_ - first, block_), tiles = strips * tiles_x_;
        const bool has_v = blocks_ == 1 && k > 0;  // of the turn before
#pragma omp parallel num_threads(workers) if (workers > 1)
        {
#pragma omp for schedule(static, 1)
            for (int64_t worker = 0; worker < workers; ++worker) {
                const Share share(has_v ? 0 : strips, worker, workers);
                for (int64_t i = share.first; i < share.end; ++i)
                    samples(first + i, v + i * tiles_x_ * v_.row, in[worker]);
            }
#pragma omp for schedule(static)
            for (int64_t p = 0; p < kPoints; ++p)
                multiply(v + p * v_.point, u + p * u_point(), m + p * m_.point, tiles, at_most(call_.k - k, outputs_));
#pragma omp for schedule(static, 1)
            for (int64_t worker = 0; worker < workers; ++worker) {
                const Share share(strips, worker, workers);
                for (int64_t i = share.first; i < share.end; ++i)
                    outputs(first + i, k, m + i * tiles_x_ * m_.row, out[worker]);
            }
        }
    }

    void multiply(const float* v, const float* u, float* m, int64_t tiles, int64_t outputs) const {
        for (int64_t c = 0; c < call_.c; c += kDepth) {
            const int64_t depth = at_most(call_.c - c, kDepth);
            for (int64_t k = 0; k < outputs; k += kPanel)
                product(tiles, outputs - k, {v + c, v_.row, 1}, u + k * call_.c + c * kPanel, kPanel, depth, m + k,
                        m_.row, c > 0);
        }
    }

    // A strip's rows of M → outputs k … of y.
    void outputs(int64_t strip, int64_t k0, const float* m, const Strip& work) const {
        const int64_t count = at_most(call_.k - k0, outputs_), n = strip / tiles_y_, y0 = strip % tiles_y_ * kTile;
        const int64_t height = at_most(call_.h - y0, kTile);
        // Whole vectors go straight to the pixels of y, others to pixels beside it.
        const bool direct = y_.pixels && count % 8 == 0;
        const int64_t pixel = direct ? call_.k : round_up(count, 8);
        const int64_t row = (direct ? call_.width : tiles_x_ * kTile) * pixel;
        float* to = direct ? y_.row(n, y0) + k0 : work.pixels.data();
        for (int64_t tile = 0; tile < tiles_x_; ++tile) {
            const int64_t width = direct ? at_most(call_.width - tile * kTile, kTile) : kTile;
            float* corner = to + tile * kTile * pixel;
            for (int64_t k = 0; k < count; k += 8)
                output_tile(m + tile * m_.row + k, bias(k0 + k), corner + k, row, pixel, height, width);
        }
        if (direct) return;
        for (int64_t r = 0; r < height; ++r) {
            const float* from = to + r * row;
            if (!y_.pixels)
                transpose(from, pixel, y_.plane_row(n, k0, y0 + r), call_.h * call_.width, call_.width, count);
            for (int64_t x = 0; x < call_.width && y_.pixels; ++x)
                std::copy_n(from + x * pixel, count, y_.row(n, y0 + r) + x * call_.k + k0);
        }
    }

    V8 bias(int64_t k) const {
        return call_.b ? load_few(reinterpret_cast<const float*>(call_.b) + k, at_most(call_.k - k, 8)) : V8{};
    }

    void output_tile(const float* m, const V8& bias, float* to, int64_t row, int64_t pixel, int64_t height,
                     int64_t width) const {
        V8 columns[kTile][kPatch];
        REFINE_UNROLL for (int j = 0; j < kPatch; ++j) {
            V8 in[kPatch], out[kTile];
            REFINE_UNROLL for (int r = 0; r < kPatch; ++r) in[r] = load8(m + (r * kPatch + j) * m_.point);
            gather_outputs(in, out);
            REFINE_UNROLL for (int r = 0; r < kTile; ++r) columns[r][j] = out[r];
        }
        for (int64_t r = 0; r < height; ++r) {
            V8 out[kTile];
            gather_outputs(columns[r], out);
            if (width == kTile) {
                REFINE_UNROLL for (int j = 0; j < kTile; ++j) store8(to + r * row + j * pixel, out[j] + bias);
            } else {
                for (int64_t j = 0; j < width; ++j) store8(to + r * row + j * pixel, out[j] + bias);
            }
        }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Gradient to the weights.

    // Blocks are summed in groups, as many for any number of threads, and their sums are added at the end.
    int64_t groups() const {
        return at_least(at_most(kGroupBytes / (kPoints * 4 * call_.c * outputs_), at_most(kMostGroups, blocks_)), 1);
    }

    void weight_grad() const {
        const int64_t groups = this->groups();
        const bool alone = threads_ == 1 || groups >= threads_;  // a group a worker; few groups are shared
        const int64_t workers = alone ? at_most(threads_, groups) : 1;
        const Matrices sums(outputs_, call_.c);  // (outputs × channels)
        std::vector<Buffer> v, d, s;
        for (int64_t i = 0; i < workers; ++i) v.emplace_back(v_.numbers()), d.emplace_back(m_.numbers());
        for (int64_t i = 0; i < groups; ++i) s.emplace_back(sums.numbers());
        const auto in = strips_for(threads_, call_.c), out = strips_for(threads_, call_.k);
        for (int64_t k = 0; k < call_.k; k += outputs_) {
            const int64_t count = at_most(call_.k - k, outputs_);
            const auto sum_group = [&](int64_t group, int64_t worker, int64_t helpers) {
                const Share share(blocks_, group, groups);
                for (int64_t i = share.first; i < share.end; ++i)
                    sum_block(i, i > share.first, k, count, sums, s[group].data(), v[worker].data(), d[worker].data(),
                              &in[worker], &out[worker], helpers);
            };
            if (alone) {
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(static, 1)
                for (int64_t worker = 0; worker < workers; ++worker) {
                    const Share share(groups, worker, workers);
                    for (int64_t group = share.first; group < share.end; ++group) sum_group(group, worker, 1);
                }
            } else {
                for (int64_t group = 0; group < groups; ++group) sum_group(group, 0, threads_);
            }
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t group = 1; group < groups; ++group)
                    add_row(s[0].data() + i * sums.row, s[group].data() + i * sums.row, sums.point);
                store_weights(s[0].data() + i * sums.row, sums, k + i);
            }
        }
    }

    void sum_block(int64_t block, bool add, int64_t k, int64_t count, const Matrices& sums, float* s, float* v, float* d,
                   const Strip* in, const Strip* out, int64_t workers) const {
        const int64_t first = block * block_, strips = at_most(strips_ - first, block_);
        const bool has_both = blocks_ == 1 && k > 0;  // of the turn before
#pragma omp parallel num_threads(workers) if (workers > 1)
        {
#pragma omp for schedule(static, 1)
            for (int64_t worker = 0; worker < workers; ++worker) {
                const Share share(has_both ? 0 : strips, worker, workers);
                for (int64_t i = share.first; i < share.end; ++i) {
                    samples(first + i, v + i * tiles_x_ * v_.row, in[worker]);
                    output_grads(first + i, d + i * tiles_x_ * m_.row, out[worker]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t p = 0; p < kPoints; ++p)
                for (int64_t c = 0; c < call_.c; c += kPanel)
                    product(count, call_.c - c, {d + p * m_.point + k, 1, m_.row}, v + p * v_.point + c, v_.row,
                            strips * tiles_x_, s + p * sums.point + c, sums.row, add);
        }
    }

    // An output's row at every point.
    void add_row(float* to, const float* from, int64_t point) const {
        for (int64_t p = 0; p < kPoints; ++p)
            for (int64_t c = 0; c < call_.c; ++c) to[p * point + c] += from[p * point + c];
    }

    const Conv3x3Call& call_;
    const Image x_, y_;
    const int64_t threads_, tiles_x_, tiles_y_, strips_;
    const int64_t outputs_;         // of a turn
    const int64_t block_, blocks_;  // strips of a block, blocks
    const Matrices v_, m_;
    const Buffer zeros_;
};

}  // namespace
}  // namespace refine

extern "C" int refine_conv3x3(const void* packed) {
    using namespace refine;
    Conv3x3Call call;
    memcpy(&call, packed, sizeof(call));
    try {
        Convolution(call).run();
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kOk;
}
