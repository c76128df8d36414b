// Winograd's minimal filtering F(4×4, 3×3): 16 outputs of a 3×3 correlation for 36 products instead of 144.
//
// Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. In one dimension the four
// outputs y of six samples d and three taps g are
//     y = Aᵀ [(G g) ⊙ (Bᵀ d)],
// which is the product of two polynomials by their values at six points: 0, ±a, ±b and infinity. In two dimensions each
// matrix is applied to the columns, then to the rows. A sum over channels is a sum of the products in ⊙, so every one of
// the 36 points is a product of matrices: (tiles × channels) · (channels × outputs).
// The gradient to the taps follows by transposition: dg = Gᵀ [(A dy) ⊙ (Bᵀ d)], summed over the tiles.
//
// The points are a = 5/8, b = 3/2, not Lavin & Gray's 1 and 2: the error is a quarter of theirs, twice that of a plain
// sum in float (on the choice of points: Barabasz et al., arXiv 1803.10986), and a², b², a²b² have few bits.

#pragma once

namespace refine {
namespace winograd {

constexpr int kTile = 4;    // outputs along an axis
constexpr int kPatch = 6;   // samples along an axis
constexpr int kPoints = kPatch * kPatch;

constexpr float kA = 0.625f, kB = 1.5f, kAA = kA * kA, kBB = kB * kB;
constexpr float kZero = 1 / (kAA * kBB);                  // what G divides by: Π (point − other points)
constexpr float kOverA = 1 / (2 * kAA * (kAA - kBB)), kOverB = 1 / (2 * kBB * (kBB - kAA));

// Bᵀ d: 6 → 6.
template <class V>
inline void transform_samples(const V* d, V* out) {
    const V odd_a = kA * (d[3] - kBB * d[1]), even_a = d[4] - kBB * d[2];
    const V odd_b = kB * (d[3] - kAA * d[1]), even_b = d[4] - kAA * d[2];
    out[0] = (d[4] - (kAA + kBB) * d[2]) + (kAA * kBB) * d[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = (d[5] - (kAA + kBB) * d[3]) + (kAA * kBB) * d[1];
}

// G g: 3 → 6.
template <class V>
inline void transform_taps(const V* g, V* out) {
    const V even_a = kOverA * (g[0] + kAA * g[2]), odd_a = (kOverA * kA) * g[1];
    const V even_b = kOverB * (g[0] + kBB * g[2]), odd_b = (kOverB * kB) * g[1];
    out[0] = kZero * g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[2];
}

// Gᵀ s: 6 → 3.
template <class V>
inline void gather_taps(const V* s, V* out) {
    const V sum_a = kOverA * (s[1] + s[2]), sum_b = kOverB * (s[3] + s[4]);
    out[0] = (kZero * s[0] + sum_a) + sum_b;
    out[1] = (kOverA * kA) * (s[1] - s[2]) + (kOverB * kB) * (s[3] - s[4]);
    out[2] = (s[5] + kAA * sum_a) + kBB * sum_b;
}

// Aᵀ m: 6 → 4.
template <class V>
inline void gather_outputs(const V* m, V* out) {
    const V sum_a = m[1] + m[2], diff_a = kA * (m[1] - m[2]);
    const V sum_b = m[3] + m[4], diff_b = kB * (m[3] - m[4]);
    out[0] = (m[0] + sum_a) + sum_b;
    out[1] = diff_a + diff_b;
    out[2] = kAA * sum_a + kBB * sum_b;
    out[3] = (m[5] + kAA * diff_a) + kBB * diff_b;
}

// A dy: 4 → 6.
template <class V>
inline void transform_outputs(const V* y, V* out) {
    const V even_a = y[0] + kAA * y[2], odd_a = kA * (y[1] + kAA * y[3]);
    const V even_b = y[0] + kBB * y[2], odd_b = kB * (y[1] + kBB * y[3]);
    out[0] = y[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = y[3];
}

}  // namespace winograd
}  // namespace refine
