// Small products of float matrices, the sums of a piece in registers: 6 rows of 2 vectors, as many as AVX2 has room for.

#pragma once

#include "vectors.h"

namespace refine {

// Short loops over vectors are written out: -O2 would leave them, and with them arrays of vectors in memory.
#define REFINE_UNROLL _Pragma("GCC unroll 8")

using V8 = Vec<float>;

constexpr int kPanel = 16;  // numbers side by side: two vectors
constexpr int kRows = 6;

inline V8 splat(float x) { return V8{x, x, x, x, x, x, x, x}; }
inline V8 load8(const float* from) { return load_vec(from); }
inline void store8(float* to, const V8& v) { store_vec<float, float>(to, v); }

// Where the left factor lies: element (row, term).
struct Left {
    const float* data;
    int64_t row, term;  // strides
};

// to[Rows × 8·Vectors] (+)= left[Rows × terms] · right[terms × 8·Vectors].
template <int Rows, int Vectors>
void product_piece(const Left& left, const float* right, int64_t right_term, int64_t terms, float* to, int64_t to_row,
                   bool add) {
    V8 sum[Rows][Vectors] = {};
    const float* column = left.data;
    for (int64_t t = 0; t < terms; ++t, column += left.term, right += right_term) {
        V8 b[Vectors];
        REFINE_UNROLL for (int j = 0; j < Vectors; ++j) b[j] = load8(right + 8 * j);
        REFINE_UNROLL for (int i = 0; i < Rows; ++i) {
            const V8 a = splat(column[i * left.row]);
            REFINE_UNROLL for (int j = 0; j < Vectors; ++j) sum[i][j] += a * b[j];
        }
    }
    REFINE_UNROLL for (int i = 0; i < Rows; ++i) {
        REFINE_UNROLL for (int j = 0; j < Vectors; ++j) {
            float* at = to + i * to_row + 8 * j;
            store8(at, add ? load8(at) + sum[i][j] : sum[i][j]);
        }
    }
}

template <int Vectors, class... Args>
void product_rows(int64_t rows, const Args&... args) {
    switch (rows) {
        case 1: return product_piece<1, Vectors>(args...);
        case 2: return product_piece<2, Vectors>(args...);
        case 3: return product_piece<3, Vectors>(args...);
        case 4: return product_piece<4, Vectors>(args...);
        case 5: return product_piece<5, Vectors>(args...);
        case 6: return product_piece<6, Vectors>(args...);
    }
}

// to[rows × columns] (+)= left[rows × terms] · right[terms × columns], at most kPanel columns; written and read are 8
// or all 16 of a row. Rows go in pieces that are as equal as can be.
inline void product(int64_t rows, int64_t columns, const Left& left, const float* right, int64_t right_term,
                    int64_t terms, float* to, int64_t to_row, bool add) {
    const int64_t pieces = ceil_div(rows, kRows);
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = rows * i / pieces, count = rows * (i + 1) / pieces - first;
        const Left part = {left.data + first * left.row, left.row, left.term};
        if (columns <= 8)
            product_rows<1>(count, part, right, right_term, terms, to + first * to_row, to_row, add);
        else
            product_rows<2>(count, part, right, right_term, terms, to + first * to_row, to_row, add);
    }
}

// 8 × 8 numbers: three perfect shuffles turn rows into columns.
inline void transpose8(V8* v) {
    V8 a[8];
    REFINE_UNROLL for (int i = 0; i < 4; ++i)
        a[2 * i] = interleave<0, float>(v[i], v[i + 4]), a[2 * i + 1] = interleave<1, float>(v[i], v[i + 4]);
    REFINE_UNROLL for (int i = 0; i < 4; ++i)
        v[2 * i] = interleave<0, float>(a[i], a[i + 4]), v[2 * i + 1] = interleave<1, float>(a[i], a[i + 4]);
    REFINE_UNROLL for (int i = 0; i < 4; ++i)
        a[2 * i] = interleave<0, float>(v[i], v[i + 4]), a[2 * i + 1] = interleave<1, float>(v[i], v[i + 4]);
    REFINE_UNROLL for (int i = 0; i < 8; ++i) v[i] = a[i];
}

// (rows × columns) → (columns × rows); strides of the rows of each.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r += 8) {
        for (int64_t c = 0; c < columns; c += 8) {
            const int64_t height = at_most(rows - r, 8), width = at_most(columns - c, 8);
            const float* corner = from + r * from_row + c;
            float* target = to + c * to_row + r;
            if (height == 8 && width == 8) {
                V8 v[8];
                REFINE_UNROLL for (int i = 0; i < 8; ++i) v[i] = load8(corner + i * from_row);
                transpose8(v);
                REFINE_UNROLL for (int i = 0; i < 8; ++i) store8(target + i * to_row, v[i]);
            } else {
                for (int64_t i = 0; i < height; ++i)
                    for (int64_t j = 0; j < width; ++j) target[j * to_row + i] = corner[i * from_row + j];
            }
        }
    }
}

}  // namespace refine
