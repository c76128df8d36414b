// Runs the 3×3 convolution on random calls of all layouts and compares it with a plain loop in double. Meant to be
// compiled with -fsanitize=address,undefined: every buffer is exactly as large as promised.
// Prints how many calls agreed; exits with 1 at the first that does not.

#include <cstdio>
#include <cstdlib>
#include <random>

#include "conv3x3.cpp"

using namespace refine;

static std::mt19937 rng(0);

static int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

static std::vector<float> random_numbers(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> numbers(count);
    for (float& number : numbers) number = normal(rng);
    return numbers;
}

static void compare(const char* what, const std::vector<double>& expected, const std::vector<float>& found) {
    double largest = 0;
    for (double number : expected) largest = std::max(largest, std::fabs(number));
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!(std::fabs(expected[i] - found[i]) <= 1e-5 * largest)) {
            std::printf("%s: number %zu is %g, expected %g\n", what, i, found[i], expected[i]);
            std::exit(1);
        }
    }
}

struct Shape {
    int64_t n, c, k, h, w;
    bool x_pixels, y_pixels, w_pixels, turned;

    static int64_t at(bool pixels, int64_t n, int64_t c, int64_t y, int64_t x, int64_t channels, int64_t h, int64_t w) {
        return pixels ? ((n * h + y) * w + x) * channels + c : ((n * channels + c) * h + y) * w + x;
    }
    // Of the weight of output `ki`, channel `ci` at (y, x) of the kernel.
    int64_t weight(int64_t ki, int64_t ci, int64_t y, int64_t x) const {
        return turned ? at(w_pixels, ci, ki, 2 - y, 2 - x, k, 3, 3) : at(w_pixels, ki, ci, y, x, c, 3, 3);
    }

    template <class Body>
    void each_product(Body body) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t ki = 0; ki < k; ++ki)
                for (int64_t ci = 0; ci < c; ++ci)
                    for (int64_t row = 0; row < h; ++row)
                        for (int64_t column = 0; column < w; ++column)
                            for (int64_t tap = 0; tap < 9; ++tap) {
                                const int64_t y = row + tap / 3 - 1, x = column + tap % 3 - 1;
                                if (y < 0 || y >= h || x < 0 || x >= w) continue;
                                body(at(x_pixels, i, ci, y, x, c, h, w), weight(ki, ci, tap / 3, tap % 3),
                                     at(y_pixels, i, ki, row, column, k, h, w));
                            }
    }
};

static void run(const Shape& s, int64_t threads) {
    std::vector<float> x = random_numbers(s.n * s.c * s.h * s.w), w = random_numbers(s.k * s.c * 9);
    std::vector<float> y(s.n * s.k * s.h * s.w), b = random_numbers(s.k);
    std::vector<double> expected(y.size()), gradient(w.size());
    const int64_t base = s.weight(0, 0, 0, 0);
    Conv3x3Call call = {int64_t(x.data()), int64_t(w.data() + base), int64_t(b.data()), int64_t(y.data()), 0,
                        s.x_pixels, s.y_pixels, s.n, s.c, s.k, s.h, s.w,
                        s.k > 1 ? s.weight(1, 0, 0, 0) - base : 1, s.c > 1 ? s.weight(0, 1, 0, 0) - base : 1,
                        s.weight(0, 0, 1, 0) - base, s.weight(0, 0, 0, 1) - base, threads};
    refine_conv3x3(&call);
    s.each_product([&](int64_t xi, int64_t wi, int64_t yi) { expected[yi] += double(x[xi]) * w[wi]; });
    for (int64_t i = 0; i < s.n; ++i)
        for (int64_t ki = 0; ki < s.k; ++ki)
            for (int64_t p = 0; p < s.h * s.w; ++p)
                expected[Shape::at(s.y_pixels, i, ki, p / s.w, p % s.w, s.k, s.h, s.w)] += b[ki];
    compare("forward", expected, y);

    y = random_numbers(y.size());
    call.y = int64_t(y.data());
    call.weight_grad = 1;
    refine_conv3x3(&call);
    s.each_product([&](int64_t xi, int64_t wi, int64_t yi) { gradient[wi] += double(x[xi]) * y[yi]; });
    compare("weight gradient", gradient, w);
}

int main(int argc, char** argv) {
    const int calls = argc > 1 ? std::atoi(argv[1]) : 20;
    for (int i = 0; i < calls; ++i)
        run({pick(1, 3), pick(1, 40), pick(1, 40), pick(1, 14), pick(1, 14), pick(0, 1) != 0, pick(0, 1) != 0,
             pick(0, 1) != 0, pick(0, 1) != 0},
            pick(1, 3));
    std::printf("%d calls agree\n", calls);
}
