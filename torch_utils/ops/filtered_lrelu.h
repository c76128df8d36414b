// What the CPU's and the GPU's kernel of filtered_lrelu share: the call.
//
// y = shrink(φ(enlarge(x + b))). φ is lrelu, gain and clamp, or, in derivatives, a product with the slopes that a mask
// holds. The derivative with respect to x is the same with up and down, the filters and their paddings exchanged, and so is
// its derivative: the mask belongs to the image between the filters, which is the same for all of them.

#pragma once

#include "kernels.h"

namespace refine {

enum Step : int64_t { kStepLrelu, kStepAndMask, kStepByMask };

// As the Python side packs it: eight bytes a field. Images are planes (N, C, H, W). A filter is Acc[height · width], or
// Acc[width] for both axes when height is 0.
struct FilteredLreluRecord {
    int64_t x, b, fu, fd, mask, y;  // addresses; null where not used
    int64_t dtype, step;
    int64_t n, c, h, w, mid_h, mid_w, out_h, out_w;  // mid: between the filters
    int64_t fuh, fuw, fdh, fdw;
    int64_t up, down;
    int64_t pad_x, pad_y;      // zeros (negative: samples cut off) before the enlarged image, ahead of its filter
    int64_t inset_x, inset_y;  // the same ahead of the second filter
    int64_t flip;              // the filters are in correlation order
    double scale, gain, slope, clamp;  // scale: factor on the enlarged image; clamp < 0: off
};

struct FilteredLreluCall : FilteredLreluRecord {
    int64_t threads;  // of OpenMP
};

// ---------------------------------------------------------------------------------------------------------------------
// On CUDA a block makes a tile of outputs, with everything before it in shared memory. What it needs of the image between
// the filters overlaps with its neighbours' and is made twice. The mask has four numbers in a byte, their signs in the
// lower half; so that a byte is whole, that part of the image begins and ends at a multiple of four, and whoever writes
// a byte writes the same one.

struct FilteredLreluTilesRecord : FilteredLreluRecord {
    int64_t tile_h, tile_w;            // outputs of a tile
    int64_t between_h, between_w;      // numbers between the filters that they need; the width a multiple of four
    int64_t held_h, held_w;            // samples of the input that those need
    int64_t tiles_y, tiles_x, clamped;
};

constexpr int kLreluThreads = 256;

template <int Up, int Down, class Number>
struct LreluTile {
    using Acc = typename AccOf<Number>::type;

    const FilteredLreluTilesRecord& t;
    int64_t plane, out_y, out_x, mid_y, mid_x, in_y, in_x;  // first of each
    int tap_y, tap_x;                                       // that meets the first sample
    int skipped;                                            // numbers between the filters ahead of the first output's
    Acc *fu, *fd, *held, *between, *work;

    REFINE_FN LreluTile(const FilteredLreluTilesRecord& record, int64_t block, Acc* shared) : t(record) {
        out_x = block % t.tiles_x * t.tile_w;
        block /= t.tiles_x;
        out_y = block % t.tiles_y * t.tile_h;
        plane = block / t.tiles_y;
        mid_y = out_y * down() - t.inset_y;
        const int64_t first = out_x * down() - t.inset_x;
        mid_x = 4 * floor_div(first, 4);
        skipped = int(first - mid_x);
        in_y = ceil_div(mid_y - t.pad_y, up());
        in_x = ceil_div(mid_x - t.pad_x, up());
        tap_y = int(in_y * up() + t.pad_y - mid_y);
        tap_x = int(in_x * up() + t.pad_x - mid_x);
        fu = shared;
        fd = fu + up_numbers();
        held = fd + (t.fdh ? t.fdh : 1) * t.fdw;
        between = held + t.held_h * t.held_w;
        work = between + t.between_h * t.between_w;
    }

    REFINE_FN int up() const { return Up ? Up : int(t.up); }
    REFINE_FN int down() const { return Down ? Down : int(t.down); }
    REFINE_FN int up_numbers() const { return int((t.fuh ? t.fuh : 1) * t.fuw); }
    REFINE_FN int down_numbers() const { return int((t.fdh ? t.fdh : 1) * t.fdw); }
    REFINE_FN int first_of(int i, int tap) const { return (i - tap + up() - 1) / up(); }  // sample that number i begins at

    REFINE_FN void load_all(int thread) const {
        const Acc* u = reinterpret_cast<const Acc*>(t.fu);
        const Acc* d = reinterpret_cast<const Acc*>(t.fd);
        const int ups = up_numbers(), downs = down_numbers();
        for (int i = thread; i < ups; i += kLreluThreads) fu[i] = u[t.flip ? i : ups - 1 - i];
        for (int i = thread; i < downs; i += kLreluThreads) fd[i] = d[t.flip ? i : downs - 1 - i];
        const Acc bias = t.b ? Acc(load(reinterpret_cast<const Number*>(t.b)[plane % t.c])) : Acc(0);
        const Number* x = reinterpret_cast<const Number*>(t.x) + plane * t.h * t.w;
        const int width = int(t.held_w), count = int(t.held_h) * width;
        for (int i = thread; i < count; i += kLreluThreads) {
            const int64_t row = in_y + i / width, col = in_x + i % width;
            const bool inside = row >= 0 && row < t.h && col >= 0 && col < t.w;
            held[i] = inside ? Acc(load(x[row * t.w + col])) + bias : Acc(0);
        }
    }

    // Along the rows, where a filter serves both axes.
    REFINE_FN void enlarge_rows(int thread) const {
        if (t.fuh) return;
        const int width = int(t.between_w), count = int(t.held_h) * width, taps = int(t.fuw);
        for (int i = thread; i < count; i += kLreluThreads) {
            const int col = i % width, first = first_of(col, tap_x);
            const Acc* from = held + i / width * t.held_w + first;
            Acc sum = Acc(0);
            for (int tap = first * up() + tap_x - col; tap < taps; tap += up()) sum += fu[tap] * *from++;
            work[i] = sum;
        }
    }

    REFINE_FN Acc enlarged(int row, int col) const {
        const int first_y = first_of(row, tap_y), first_x = first_of(col, tap_x), taps = int(t.fuw);
        const int begin_y = first_y * up() + tap_y - row, begin_x = first_x * up() + tap_x - col;
        Acc sum = Acc(0);
        if (!t.fuh) {
            const Acc* from = work + first_y * t.between_w + col;
            for (int tap = begin_y; tap < taps; tap += up(), from += t.between_w) sum += fu[tap] * *from;
            return sum;
        }
        for (int y = begin_y, row_of = first_y; y < int(t.fuh); y += up(), ++row_of) {
            const Acc* from = held + row_of * t.held_w + first_x;
            for (int x = begin_x; x < taps; x += up()) sum += fu[y * taps + x] * *from++;
        }
        return sum;
    }

    REFINE_FN void apply_slopes(int thread) const {
        const Acc scale = Acc(t.scale), gain = Acc(t.gain), slope = Acc(t.slope), clamp = Acc(t.clamp);
        const int groups = int(t.between_w) / 4, count = int(t.between_h) * groups;
        for (int i = thread; i < count; i += kLreluThreads) {
            const int row = i / groups, col = i % groups * 4;
            const int64_t y = mid_y + row, x = mid_x + col;
            Acc* to = between + row * t.between_w + col;
            const bool inside = y >= 0 && y < t.mid_h && x >= 0 && x < t.mid_w;
            uint8_t* byte = nullptr;
            if (inside && t.step != kStepLrelu)
                byte = reinterpret_cast<uint8_t*>(t.mask) + (plane * t.mid_h + y) * ((t.mid_w + 3) / 4) + x / 4;
            const int bits = inside && t.step == kStepByMask ? *byte : 0;
            int made = 0;
            for (int k = 0; k < 4; ++k) {
                Acc v = Acc(0);
                if (inside && x + k < t.mid_w) {
                    const Acc z = enlarged(row, col + k) * scale;
                    bool positive = z > Acc(0), passes = true;
                    if (t.step == kStepByMask) positive = bits >> k & 1, passes = bits >> (4 + k) & 1;
                    v = positive ? z * gain : z * slope * gain;
                    if (t.step == kStepByMask) {
                        v = passes ? v : Acc(0);
                    } else if (t.clamped) {
                        passes = v <= clamp && v >= -clamp;
                        v = v < -clamp ? -clamp : v > clamp ? clamp : v;  // a NaN stays one
                    }
                    made |= int(positive) << k | int(passes) << (4 + k);
                }
                to[k] = v;
            }
            if (inside && t.step == kStepAndMask) *byte = uint8_t(made);
        }
    }

    REFINE_FN void shrink_rows(int thread) const {
        if (t.fdh) return;
        const int width = int(t.tile_w), count = int(t.between_h) * width, taps = int(t.fdw);
        for (int i = thread; i < count; i += kLreluThreads) {
            const Acc* from = between + i / width * t.between_w + skipped + i % width * down();
            Acc sum = Acc(0);
            for (int tap = 0; tap < taps; ++tap) sum += fd[tap] * from[tap];
            work[i] = sum;
        }
    }

    REFINE_FN void store_outputs(int thread) const {
        const int width = int(t.tile_w), count = int(t.tile_h) * width, taps = int(t.fdw);
        Number* y = reinterpret_cast<Number*>(t.y) + plane * t.out_h * t.out_w;
        for (int i = thread; i < count; i += kLreluThreads) {
            const int row = i / width, col = i % width;
            if (out_y + row >= t.out_h || out_x + col >= t.out_w) continue;
            Acc sum = Acc(0);
            if (!t.fdh) {
                const Acc* from = work + row * down() * width + col;
                for (int tap = 0; tap < taps; ++tap) sum += fd[tap] * from[tap * width];
            } else {
                for (int k = 0; k < int(t.fdh); ++k) {
                    const Acc* from = between + (row * down() + k) * t.between_w + skipped + col * down();
                    for (int tap = 0; tap < taps; ++tap) sum += fd[k * taps + tap] * from[tap];
                }
            }
            store(&y[(out_y + row) * t.out_w + out_x + col], sum);
        }
    }
};

}  // namespace refine
