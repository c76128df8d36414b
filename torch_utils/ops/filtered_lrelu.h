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
struct FilteredLreluCall {
    int64_t x, b, fu, fd, mask, y;  // addresses; null where not used
    int64_t dtype, step;
    int64_t n, c, h, w, mid_h, mid_w, out_h, out_w;  // mid: between the filters
    int64_t fuh, fuw, fdh, fdw;
    int64_t up, down;
    int64_t pad_x, pad_y;      // zeros (negative: samples cut off) before the enlarged image, ahead of its filter
    int64_t inset_x, inset_y;  // the same ahead of the second filter
    int64_t flip;              // the filters are in correlation order
    double scale, gain, slope, clamp;  // scale: factor on the enlarged image; clamp < 0: off
    int64_t threads, stream;
};

}  // namespace refine
