// filtered_lrelu on the CPU: what lies between the two filters never leaves the cache.
//
// A plane is gone through from top to bottom. A row of it, bias added, is enlarged along the row and kept for as long as
// rows of the enlarged image need it; such a row is a weighted sum of a few kept ones, to which the nonlinearity is
// applied; it is shrunk along the row and kept in turn, and output rows are weighted sums of those. Rows in work have
// `lanes`: of enlarged samples every lanes-th, so that neither enlarging nor shrinking leaves gaps, and every step is the
// same loop, a weighted sum of shifted rows in whole vectors.
//
// A 2-D filter that is no product is taken row by row. Rows of taps that are equal (those of a circular filter are, in
// pairs) are computed once.

#include <algorithm>
#include <new>
#include <vector>

#include "filtered_lrelu.h"
#include "four_taps.h"
#include "taps.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace refine {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// A weighted sum of rows.

#define REFINE_INLINE inline __attribute__((always_inline))
#define REFINE_LAMBDA __attribute__((always_inline))

template <class Acc>
struct Terms {
    std::vector<const Acc*> rows;
    std::vector<Acc> weights;
    int64_t count = 0;

    explicit Terms(int64_t most) : rows(most), weights(most) {}

    void add(const Acc* row, Acc weight) {
        rows[count] = row;
        weights[count++] = weight;
    }
};

// `Vectors` of them at once, in registers: a single sum would wait for each of its terms.
template <int Vectors, class Acc, class Use>
REFINE_INLINE void sum_vectors(const Terms<Acc>& terms, int64_t at, const Use& use) {
    using V = Vec<Acc>;
    constexpr int64_t step = kLanes<Acc>;
    V a0{}, a1{}, a2{}, a3{}, a4{}, a5{}, a6{}, a7{}, a8{}, a9{};
    const Acc* const* rows = terms.rows.data();
    const Acc* weights = terms.weights.data();
    for (int64_t t = 0; t < terms.count; ++t) {
        const Acc* row = rows[t] + at;
        const V w = weights[t] - V{};
        a0 += w * load_vec(row), a1 += w * load_vec(row + step);
        if constexpr (Vectors > 2) a2 += w * load_vec(row + 2 * step), a3 += w * load_vec(row + 3 * step);
        if constexpr (Vectors > 4) a4 += w * load_vec(row + 4 * step), a5 += w * load_vec(row + 5 * step);
        if constexpr (Vectors > 6) a6 += w * load_vec(row + 6 * step), a7 += w * load_vec(row + 7 * step);
        if constexpr (Vectors > 8) a8 += w * load_vec(row + 8 * step), a9 += w * load_vec(row + 9 * step);
    }
    use(at, a0), use(at + step, a1);
    if constexpr (Vectors > 2) use(at + 2 * step, a2), use(at + 3 * step, a3);
    if constexpr (Vectors > 4) use(at + 4 * step, a4), use(at + 5 * step, a5);
    if constexpr (Vectors > 6) use(at + 6 * step, a6), use(at + 7 * step, a7);
    if constexpr (Vectors > 8) use(at + 8 * step, a8), use(at + 9 * step, a9);
}

// use(i, v) for all vectors of `length` sums, a multiple of kPair.
template <class Acc, class Use>
REFINE_INLINE void sum_terms(const Terms<Acc>& terms, int64_t length, const Use& use) {
    constexpr int64_t step = kLanes<Acc>;
    for (int64_t i = 0, left = length / step; left > 0;) {
        const int64_t turns = ceil_div(left, 10), vectors = round_up(ceil_div(left, turns), 2);
        switch (vectors) {
            case 2: sum_vectors<2>(terms, i, use); break;
            case 4: sum_vectors<4>(terms, i, use); break;
            case 6: sum_vectors<6>(terms, i, use); break;
            case 8: sum_vectors<8>(terms, i, use); break;
            default: sum_vectors<10>(terms, i, use);
        }
        left -= vectors;
        i += vectors * step;
    }
}

template <class Acc>
void sum_into(Acc* out, const Terms<Acc>& terms, int64_t length) {
    sum_terms(terms, length, [out](int64_t i, const Vec<Acc>& v) REFINE_LAMBDA { store_vec<Acc, Acc>(out + i, v); });
}

// ---------------------------------------------------------------------------------------------------------------------
// The nonlinearity and its mask: for a vector a byte of signs, and a byte that says which numbers are not clamped.

template <class Acc>
inline unsigned bits_of(const typename VecOf<Acc>::bits& mask) {
#ifdef __AVX__
    if constexpr (sizeof(Acc) == 4) return unsigned(_mm256_movemask_ps(__m256(mask)));
    else return unsigned(_mm256_movemask_pd(__m256d(mask)));
#else
    Acc lanes[kLanes<Acc>];
    uint64_t sign = 0;
    unsigned bits = 0;
    memcpy(lanes, &mask, sizeof(lanes));
    for (int i = 0; i < kLanes<Acc>; ++i) {
        sign = 0;
        memcpy(&sign, &lanes[i], sizeof(Acc));
        bits |= unsigned(sign != 0) << i;
    }
    return bits;
#endif
}

template <class Acc>
inline auto mask_of(unsigned bits) {
    if constexpr (sizeof(Acc) == 4) {
        typedef int32_t Ints __attribute__((vector_size(32)));
        constexpr Ints lanes = {1, 2, 4, 8, 16, 32, 64, 128};
        return ((int32_t(bits) - Ints{}) & lanes) != 0;
    } else {
        typedef int64_t Ints __attribute__((vector_size(32)));
        constexpr Ints lanes = {1, 2, 4, 8};
        return ((int64_t(bits) - Ints{}) & lanes) != 0;
    }
}

template <class Acc>
struct Slopes {
    Vec<Acc> above, below, limit;  // factors of numbers above zero and below
    bool clamped;

    explicit Slopes(const FilteredLreluCall& call)
        : above(Acc(call.gain) - Vec<Acc>{}),
          below(Acc(call.gain * call.slope) - Vec<Acc>{}),
          limit(Acc(call.clamp) - Vec<Acc>{}),
          clamped(call.clamp >= 0) {}

    template <Step S>
    REFINE_INLINE Vec<Acc> apply(const Vec<Acc>& z, uint8_t* mask) const {
        using V = Vec<Acc>;
        using Bits = typename VecOf<Acc>::bits;
        if constexpr (S == kStepByMask) {
            const V v = z * (mask_of<Acc>(mask[0]) ? above : below);
            return clamped ? V(Bits(v) & Bits(mask_of<Acc>(mask[1]))) : v;
        }
        const auto positive = z > 0;
        V v = z * (positive ? above : below);
        if (S == kStepAndMask) mask[0] = uint8_t(bits_of<Acc>(Bits(positive)));
        if (!clamped) return v;
        if (S == kStepAndMask) mask[1] = uint8_t(bits_of<Acc>(Bits((v <= limit) & (v >= -limit))));
        v = v < -limit ? -limit : v;  // a NaN stays one
        return v > limit ? limit : v;
    }
};

// ---------------------------------------------------------------------------------------------------------------------

// One filter of the two: rows of taps that differ, and the weight that a row of them has in an output's sum.
template <class Acc>
struct Rows {
    std::vector<std::vector<Acc>> distinct;
    std::vector<int64_t> which;  // of the taps' rows
    std::vector<Acc> weight;

    explicit Rows(const Taps<Acc>& taps, int64_t width) {
        if (taps.separable) {
            distinct.push_back(taps.row);
            which.assign(taps.column.size(), 0);
            weight = taps.column;
            return;
        }
        for (auto row = taps.all.begin(); row != taps.all.end(); row += width) {
            const std::vector<Acc> one(row, row + width);
            const auto same = std::find(distinct.begin(), distinct.end(), one);
            which.push_back(same - distinct.begin());
            if (same == distinct.end()) distinct.push_back(one);
            weight.push_back(1);
        }
    }
};

template <class Number>
class FilteredLrelu {
    using Acc = typename AccOf<Number>::type;
    static constexpr int64_t kVec = kLanes<Acc>, kPair = 2 * kVec;

public:
    explicit FilteredLrelu(const FilteredLreluCall& call)
        : call_(call),
          slopes_(call),
          up_taps_(reinterpret_cast<const Acc*>(call.fu), call.fuh, call.fuw, call.flip, Acc(call.scale)),
          down_taps_(reinterpret_cast<const Acc*>(call.fd), call.fdh, call.fdw, call.flip, Acc(1)),
          up_rows_(up_taps_, call.fuw),
          down_rows_(down_taps_, call.fdw),
          up_x_{call.w, call.mid_w, call.fuw, call.up, 1, call.pad_x},
          up_y_{call.h, call.mid_h, call.fuh ? call.fuh : call.fuw, call.up, 1, call.pad_y},
          down_y_taps_(call.fdh ? call.fdh : call.fdw),
          lanes_(common_multiple(call.up, call.down)),
          in_lanes_(lanes_ / call.up),
          out_lanes_(lanes_ / call.down),
          mid_(round_up(ceil_div(call.mid_w, lanes_), kPair)),
          out_(round_up(ceil_div(call.out_w, out_lanes_), kPair)) {
        int64_t reach = 0;
        for (int64_t p = 0; p < lanes_; ++p) in_left_ = at_least(in_left_, -unclipped_window(up_x_, p).first);
        for (int64_t p = 0; p < lanes_; ++p) {
            const Window win = unclipped_window(up_x_, p);
            reach = at_least(reach, win.first + win.count + in_left_);
        }
        in_ = at_least(ceil_div(reach, in_lanes_) + mid_, ceil_div(in_left_ + call.w, in_lanes_)) + kVec;
        const int64_t last = (out_lanes_ - 1) * call.down + call.fdw - 1 - call.inset_x;
        mid_left_ = at_least(ceil_div(call.inset_x, lanes_), 0);
        mid_step_ = round_up(mid_left_ + at_least(mid_, at_least(floor_div(last, lanes_), 0) + out_), kPair);
        kept_ = ceil_div(up_y_.taps, call.up);
        kept_step_ = int64_t(up_rows_.distinct.size()) * lanes_ * mid_;
        by_rows_ = !down_taps_.separable;
        shrunk_step_ = by_rows_ ? lanes_ * mid_step_ : out_lanes_ * out_;
    }

    // False: no memory for the rows in work.
    bool run() const {
        const int64_t planes = call_.n * call_.c;
        return share_rows(planes, planes * call_.mid_h * call_.mid_w, call_.threads, [&](int64_t begin, int64_t end) {
            Work work(*this);
            for (int64_t plane = begin; plane < end; ++plane) {
                if (call_.step == kStepLrelu) run_plane<kStepLrelu>(plane, work);
                if (call_.step == kStepAndMask) run_plane<kStepAndMask>(plane, work);
                if (call_.step == kStepByMask) run_plane<kStepByMask>(plane, work);
            }
        });
    }

private:
    static int64_t common_multiple(int64_t a, int64_t b) {
        int64_t x = a, y = b;
        while (y) std::swap(x %= y, y);
        return a / x * b;
    }

    // Rows in work, zeros where nothing is written, and the sums along a row, which are always of the same memory.
    struct Work {
        std::vector<Acc> input;   // in_lanes_ × in_
        std::vector<Acc> kept;    // kept_ rows of the input, enlarged along the row: distinct rows of taps × lanes_ × mid_
        std::vector<Acc> mid;     // lanes_ × mid_step_; as many as there are rows of taps where `by_rows_`
        std::vector<Acc> shrunk;  // rows of taps × out_lanes_ × out_
        std::vector<Acc> groups;  // `by_rows_`: sums of rows that have the same taps
        std::vector<Acc> out;     // out_lanes_ × out_
        std::vector<Terms<Acc>> enlarge, shrink;
        Terms<Acc> terms;  // down the columns

        explicit Work(const FilteredLrelu& f)
            : input(f.in_lanes_ * f.in_),
              kept(f.kept_ * f.kept_step_),
              mid(f.lanes_ * f.mid_step_ * (f.by_rows_ ? f.down_y_taps_ : 1)),
              shrunk(f.by_rows_ ? 0 : f.down_y_taps_ * f.shrunk_step_),
              groups(f.by_rows_ ? int64_t(f.down_rows_.distinct.size()) * f.shrunk_step_ : 0),
              out(f.out_lanes_ * f.out_),
              terms(at_least(f.kept_, f.down_y_taps_)) {
            for (const auto& taps : f.up_rows_.distinct) {
                for (int64_t p = 0; p < f.lanes_; ++p) {
                    const Window win = unclipped_window(f.up_x_, p);
                    enlarge.emplace_back(win.count);
                    for (int64_t j = 0; j < win.count; ++j) {
                        const int64_t sample = win.first + j + f.in_left_;
                        const Acc* row = &input[sample % f.in_lanes_ * f.in_ + sample / f.in_lanes_];
                        enlarge.back().add(row, taps[win.tap + j * f.call_.up]);
                    }
                }
            }
            for (int64_t r = 0; r < f.out_lanes_; ++r) {
                shrink.emplace_back(int64_t(f.down_rows_.distinct.size()) * f.call_.fdw);
                for (size_t g = 0; g < f.down_rows_.distinct.size(); ++g) {
                    const Acc* base = (f.by_rows_ ? &groups[g * f.shrunk_step_] : mid.data()) + f.mid_left_;
                    for (int64_t k = 0; k < f.call_.fdw; ++k) {
                        const int64_t at = r * f.call_.down + k - f.call_.inset_x, shift = floor_div(at, f.lanes_);
                        const Acc* row = base + (at - shift * f.lanes_) * f.mid_step_ + shift;
                        shrink.back().add(row, f.down_rows_.distinct[g][k]);
                    }
                }
            }
        }
    };

    template <Step S>
    void run_plane(int64_t plane, Work& work) const {
        int64_t next_in = 0, next_mid = 0;
        Number* out = reinterpret_cast<Number*>(call_.y) + plane * call_.out_h * call_.out_w;
        for (int64_t o = 0; o < call_.out_h; ++o, out += call_.out_w) {
            const int64_t first = o * call_.down - call_.inset_y;
            const int64_t begin = at_least(first, 0), end = at_most(first + down_y_taps_, call_.mid_h);
            for (next_mid = at_least(next_mid, begin); next_mid < end; ++next_mid) {
                const Window win = window(up_y_, next_mid);
                for (next_in = at_least(next_in, win.first); next_in < win.first + win.count; ++next_in)
                    enlarge_row(plane, next_in, work);
                mid_row<S>(plane, next_mid, win, work);
            }
            output_row(first, begin, end, work);
            store_row(out, work);
        }
    }

    void enlarge_row(int64_t plane, int64_t row, Work& work) const {
        const Number* from = reinterpret_cast<const Number*>(call_.x) + (plane * call_.h + row) * call_.w;
        const Acc bias = call_.b ? Acc(load(reinterpret_cast<const Number*>(call_.b)[plane % call_.c])) : Acc(0);
        if (in_lanes_ == 1) {
            Acc* to = work.input.data() + in_left_;
            int64_t i = 0;
            for (; i + kVec <= call_.w; i += kVec) store_vec<Acc, Acc>(to + i, load_vec(from + i) + bias);
            for (; i < call_.w; ++i) to[i] = Acc(load(from[i])) + bias;
        } else {
            for (int64_t lane = 0; lane < in_lanes_; ++lane) {
                const int64_t sample = lane + in_left_;
                Acc* to = &work.input[sample % in_lanes_ * in_ + sample / in_lanes_];
                for (int64_t i = lane; i < call_.w; i += in_lanes_) *to++ = Acc(load(from[i])) + bias;
            }
        }
        Acc* kept = &work.kept[row % kept_ * kept_step_];
        for (const Terms<Acc>& terms : work.enlarge) {
            sum_into(kept, terms, mid_);
            kept += mid_;
        }
    }

    template <Step S>
    void mid_row(int64_t plane, int64_t row, const Window& win, Work& work) const {
        Acc* to = work.mid.data() + (by_rows_ ? row % down_y_taps_ * lanes_ * mid_step_ : 0) + mid_left_;
        uint8_t* mask = reinterpret_cast<uint8_t*>(call_.mask);
        if (S != kStepLrelu) mask += (plane * call_.mid_h + row) * lanes_ * (mid_ / kVec) * 2;
        Terms<Acc>& terms = work.terms;
        terms.count = 0;
        for (int64_t j = 0; j < win.count; ++j) {
            const int64_t tap = win.tap + j * call_.up, slot = (win.first + j) % kept_;
            terms.add(&work.kept[slot * kept_step_ + up_rows_.which[tap] * lanes_ * mid_], up_rows_.weight[tap]);
        }
        for (int64_t p = 0; p < lanes_; ++p, to += mid_step_) {
            sum_terms(terms, mid_, [&](int64_t i, const Vec<Acc>& z) REFINE_LAMBDA {
                store_vec<Acc, Acc>(to + i, slopes_.template apply<S>(z, mask + i / kVec * 2));
            });
            for (int64_t j = 0; j < win.count; ++j) terms.rows[j] += mid_;
            if (S != kStepLrelu) mask += mid_ / kVec * 2;
            std::fill(to + at_least(ceil_div(call_.mid_w - p, lanes_), 0), to + mid_, Acc(0));
        }
        if (by_rows_) return;
        Acc* shrunk = &work.shrunk[row % down_y_taps_ * shrunk_step_];
        for (const Terms<Acc>& terms : work.shrink) {
            sum_into(shrunk, terms, out_);
            shrunk += out_;
        }
    }

    void output_row(int64_t first, int64_t begin, int64_t end, Work& work) const {
        if (!by_rows_) {
            work.terms.count = 0;
            for (int64_t i = begin; i < end; ++i)
                work.terms.add(&work.shrunk[i % down_y_taps_ * shrunk_step_], down_rows_.weight[i - first]);
            return sum_into(work.out.data(), work.terms, out_lanes_ * out_);
        }
        for (size_t g = 0; g < down_rows_.distinct.size(); ++g) {
            work.terms.count = 0;
            for (int64_t i = begin; i < end; ++i)
                if (down_rows_.which[i - first] == int64_t(g))
                    work.terms.add(&work.mid[i % down_y_taps_ * shrunk_step_], Acc(1));
            sum_into(&work.groups[g * shrunk_step_], work.terms, lanes_ * mid_step_);
        }
        Acc* to = work.out.data();
        for (const Terms<Acc>& terms : work.shrink) {
            sum_into(to, terms, out_);
            to += out_;
        }
    }

    void store_row(Number* out, const Work& work) const {
        if (out_lanes_ == 1) return store_many(work.out.data(), out, call_.out_w);
        int64_t i = 0;
        if (out_lanes_ == 2) {
            const Acc *even = work.out.data(), *odd = even + out_;
            for (; i + 2 * kVec <= call_.out_w; i += 2 * kVec) {
                const Vec<Acc> a = load_vec(even + i / 2), b = load_vec(odd + i / 2);
                store_vec<Number, Acc>(out + i, interleave<0, Acc>(a, b));
                store_vec<Number, Acc>(out + i + kVec, interleave<1, Acc>(a, b));
            }
        }
        for (; i < call_.out_w; ++i) store(&out[i], work.out[i % out_lanes_ * out_ + i / out_lanes_]);
    }

    const FilteredLreluCall& call_;
    const Slopes<Acc> slopes_;
    const Taps<Acc> up_taps_, down_taps_;
    const Rows<Acc> up_rows_, down_rows_;
    const Axis up_x_, up_y_;
    const int64_t down_y_taps_;
    const int64_t lanes_, in_lanes_, out_lanes_;  // of the enlarged image; of the input and the output, likewise
    const int64_t mid_, out_;                     // numbers of a lane, rounded up to vectors
    int64_t in_left_ = 0, in_ = 0;         // zeros before the input in its row in work; numbers of a lane of that
    int64_t mid_left_ = 0, mid_step_ = 0;  // the same of the enlarged image
    int64_t kept_ = 0, kept_step_ = 0, shrunk_step_ = 0;  // rows that are kept, and what they take
    bool by_rows_ = false;
};

template <class Number>
int status_of(const FilteredLreluCall& call) {
    return FilteredLrelu<Number>(call).run() ? kOk : kOutOfMemory;
}

}  // namespace
}  // namespace refine

extern "C" int refine_filtered_lrelu(const void* packed) {
    using namespace refine;
    FilteredLreluCall call;
    memcpy(&call, packed, sizeof(call));
    if (call.n * call.c * call.out_h * call.out_w == 0) return kOk;
    try {
        switch (call.dtype) {
            case kFloat32: return status_of<float>(call);
            case kFloat64: return status_of<double>(call);
            case kFloat16: return status_of<Float16>(call);
            case kBFloat16: return status_of<BFloat16>(call);
        }
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kBadDType;
}
