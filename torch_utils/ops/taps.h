// The taps of a filter as the CPU's kernels want them.

#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"

namespace refine {

// Taps in correlation order, gain included; as column · row where the filter has rank one up to rounding.
template <class Acc>
struct Taps {
    bool separable = true;
    std::vector<Acc> all, column, row;  // all: row by row; empty for taps that serve both axes

    // f: (height, width), or (width,) for both axes when height is 0. flip: they are in correlation order already.
    Taps(const Acc* f, int64_t height, int64_t width, bool flip, Acc gain) {
        if (height == 0) {
            for (int64_t i = 0; i < width; ++i) row.push_back(f[flip ? i : width - 1 - i]);
            column = row;
        } else {
            for (int64_t i = 0; i < height * width; ++i) all.push_back(f[flip ? i : height * width - 1 - i]);
            int64_t pivot = 0;
            for (int64_t i = 0; i < height * width; ++i)
                if (std::fabs(all[i]) > std::fabs(all[pivot])) pivot = i;
            const Acc top = all[pivot];
            for (int64_t i = 0; i < height; ++i) column.push_back(all[i * width + pivot % width]);
            for (int64_t j = 0; j < width; ++j) row.push_back(top == 0 ? 0 : all[pivot / width * width + j] / top);
            const Acc rounding = sizeof(Acc) == 8 ? Acc(4e-16) : Acc(2.4e-7);
            for (int64_t i = 0; i < height * width; ++i) {
                const Acc error = all[i] - column[i / width] * row[i % width];
                separable = separable && std::fabs(error) <= rounding * std::fabs(all[i]);  // false for a NaN
            }
            for (Acc& tap : all) tap *= gain;
        }
        for (Acc& tap : row) tap *= gain;
    }
};

}  // namespace refine
