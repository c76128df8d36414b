// upfirdn2d on the CPU where networks use it: four taps of rank one, the same factor along both axes, either 1 or 2.
//
// Planes are filtered row by row in whole vectors. A vector may reach beyond its row: what it reads there is masked out
// of the row in work, what it writes there is written again with the next row. Only at the end of the memory a row goes
// through a copy. So a plane of 4 × 4 costs no more instructions a row than one of 8 × 8, and there are no loose ends.

#pragma once

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace refine {

constexpr int64_t kBand = 4096;          // numbers of rows in work: they stay in the first-level cache
constexpr int64_t kSmallImages = 16384;  // numbers not worth waking threads for

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls work(begin, end) for stretches of `rows` on all threads. False: no memory for the rows in work.
template <class Work>
bool share_rows(int64_t rows, int64_t numbers, int64_t most_threads, const Work& work) {
    const int64_t threads = numbers < kSmallImages ? 1 : at_least(at_most(most_threads, rows), 1);
    bool failed = false;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < threads; ++part) {
        try {
            work(rows * part / threads, rows * (part + 1) / threads);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    }
    return !failed;
}

// out[i] = Σ_j weight[j] · row[j][i] over `Count` rows, at most four; + out[i] with Add. `out` may be one of the rows.
template <int Count, bool Add, class In, class Out, class Acc>
inline void sum_rows_fixed(Out* out, const In* const* row, const Acc* weight, int64_t length) {
    using V = Vec<Acc>;
    constexpr int lanes = kLanes<Acc>, last = Count - 1;
    const V w0 = weight[0] + V{}, w1 = weight[last > 1 ? 1 : last] + V{};
    const V w2 = weight[last > 2 ? 2 : last] + V{}, w3 = weight[last] + V{};
    const auto sum = [&](const In* r0, const In* r1, const In* r2, const In* r3, const Out* before) {
        V v = w0 * load_vec(r0);
        if (Count > 1) v += w1 * load_vec(r1);
        if (Count > 2) v += w2 * load_vec(r2);
        if (Count > 3) v += w3 * load_vec(r3);
        if (Add) v += load_vec(before);
        return v;
    };
    const In *r0 = row[0], *r1 = row[last > 1 ? 1 : last], *r2 = row[last > 2 ? 2 : last], *r3 = row[last];
    int64_t i = 0;
    for (; i + lanes <= length; i += lanes)
        store_vec<Out, Acc>(out + i, sum(r0 + i, r1 + i, r2 + i, r3 + i, out + i));
    const size_t rest = size_t(length - i);
    if (rest == 0) return;
    In ends[4][lanes] = {};
    Out end[lanes] = {};
    for (int j = 0; j < Count; ++j) memcpy(ends[j], row[j] + i, rest * sizeof(In));
    if (Add) memcpy(end, out + i, rest * sizeof(Out));
    store_vec<Out, Acc>(end, sum(ends[0], ends[1], ends[2], ends[3], end));
    memcpy(out + i, end, rest * sizeof(Out));
}

template <int Up, int Down>
struct FourTapAxis {
    static constexpr int kMeet = 4 / Up;  // samples that an output is made of
    int64_t in, out, pad;

    int64_t first(int64_t o) const { return ceil_div(o * Down - pad, Up); }  // may be negative, or beyond the end
    int64_t tap(int64_t o) const { return first(o) * Up + pad - o * Down; }
};

// (N, C, H, W).
template <int Up, int Down, class Number>
class FourTapPlanes {
    using Acc = typename AccOf<Number>::type;
    using V = Vec<Acc>;
    static constexpr int kVec = kLanes<Acc>, kMeet = 4 / Up;
    static constexpr int kRead = kVec * Down, kWritten = kVec * Up;  // numbers of one step

public:
    FourTapPlanes(const Upfirdn2dCall& call, const Acc* column_taps, const Acc* row_taps)
        : x_{call.w, call.out_w, call.px0},
          y_{call.h, call.out_h, call.py0},
          from_(reinterpret_cast<const Number*>(call.x)),
          to_(reinterpret_cast<Number*>(call.y)),
          row_taps_(row_taps),
          planes_(call.n * call.c),
          threads_(call.threads),
          numbers_(planes_ * call.h * call.w) {
        begin_ = at_most(at_least(x_.first(0), 0), x_.in);
        left_ = at_least(-x_.first(0), 0);
        width_ = x_.in - begin_;
        read_ = round_up(width_, kRead);
        written_ = round_up(x_.out, kWritten);
        const int64_t reach = written_ / Up + 4;  // samples of a lane that outputs can touch
        lane_ = round_up(at_least((left_ + 1) / Down + read_ / Down, reach), kVec);
        one_ = Down == 2 && left_ % 2 ? lane_ + left_ / 2 : left_ / Down;
        two_ = left_ % 2 ? left_ / 2 + 1 : lane_ + left_ / 2;
        for (int64_t row = 0; row < y_.out; ++row) {
            const int64_t first = y_.first(row), tap = y_.tap(row);
            lines_.push_back({first, first >= 0 && first + kMeet <= y_.in, {}});
            for (int j = 0; j < kMeet; ++j) lines_.back().weights[j] = column_taps[tap + j * Up];
        }
        zeros_.resize(read_);
        tail_.resize(2 * read_);
        tail_begin_ = at_least(numbers_ - read_, 0);
        std::copy(from_ + tail_begin_, from_ + numbers_, tail_.begin());
    }

    bool run() const {
        const int64_t rows = planes_ * y_.out;
        return share_rows(rows, rows * x_.out, threads_, [&](int64_t begin, int64_t end) { run_rows(begin, end); });
    }

private:
    void run_rows(int64_t begin, int64_t end) const {
        const int64_t held_row = lane_ * Down, band = at_least(kBand / held_row, 1);
        std::vector<Acc> held(held_row * at_most(band, end - begin));  // zeros beside the samples stay as they are
        std::vector<Number> last(written_);
        int64_t plane = begin / y_.out, row = begin % y_.out;
        for (int64_t i = begin; i < end; i += band) {
            const int64_t rows = at_most(band, end - i);
            for (int64_t k = 0; k < rows; ++k) {
                sum_rows(plane, row, held.data() + k * held_row);
                if (++row == y_.out) row = 0, ++plane;
            }
            for (int64_t k = 0; k < rows; ++k) {
                Number* out = to_ + (i + k) * x_.out;
                if ((i + k) * x_.out + written_ <= end * x_.out) {
                    filter_row(held.data() + k * held_row, out);
                } else {
                    filter_row(held.data() + k * held_row, last.data());
                    std::copy(last.begin(), last.begin() + x_.out, out);
                }
            }
        }
    }

    // The samples that meet an output row: first of them, and whether all lie in the image.
    struct Line {
        int64_t first;
        bool inside;
        Acc weights[kMeet];
    };

    // `read_` numbers can be read from what it returns.
    const Number* input_row(int64_t plane, int64_t row) const {
        if (row < 0 || row >= y_.in) return zeros_.data();
        const int64_t offset = (plane * y_.in + row) * x_.in + begin_;
        return offset + read_ <= numbers_ ? from_ + offset : tail_.data() + (offset - tail_begin_);
    }

    // The rows that meet output row `row`, weighted, into the row in work; for down 2 in two lanes, so that the next
    // step reads neighbours.
    void sum_rows(int64_t plane, int64_t row, Acc* held) const {
        const Line& line = lines_[row];
        const Number* rows[kMeet];
        if (line.inside && plane + 1 < planes_ && read_ <= x_.in * y_.in) {  // almost always
            const Number* top = from_ + (plane * y_.in + line.first) * x_.in + begin_;
            for (int j = 0; j < kMeet; ++j) rows[j] = top + j * x_.in;
        } else {
            for (int j = 0; j < kMeet; ++j) rows[j] = input_row(plane, line.first + j);
        }
        const V w0 = line.weights[0] + V{}, w1 = line.weights[1] + V{};
        const V w2 = line.weights[kMeet - 2] + V{}, w3 = line.weights[kMeet - 1] + V{};
        const auto weighted = [&](int64_t i) {
            const V sum = w0 * load_vec(rows[0] + i) + w1 * load_vec(rows[1] + i);
            if constexpr (kMeet == 2) return sum;
            else return sum + (w2 * load_vec(rows[kMeet - 2] + i) + w3 * load_vec(rows[kMeet - 1] + i));
        };
        Acc *one = held + one_, *two = held + two_;
        int64_t i = 0;
        for (; i + kRead <= width_; i += kRead) {
            const V a = weighted(i);
            if (Down == 1) {
                store_vec<Acc, Acc>(one + i, a);
                continue;
            }
            const V b = weighted(i + kVec);
            store_vec<Acc, Acc>(one + i / 2, every_second<0, Acc>(a, b));
            store_vec<Acc, Acc>(two + i / 2, every_second<1, Acc>(a, b));
        }
        const int64_t rest = width_ - i;
        if (rest == 0) return;
        const V a = weighted(i);
        if (Down == 1) return store_vec<Acc, Acc>(one + i, first_lanes<Acc>(a, rest));
        const V b = rest > kVec ? weighted(i + kVec) : V{};
        store_vec<Acc, Acc>(one + i / 2, first_lanes<Acc>(every_second<0, Acc>(a, b), (rest + 1) / 2));
        store_vec<Acc, Acc>(two + i / 2, first_lanes<Acc>(every_second<1, Acc>(a, b), rest / 2));
    }

    void filter_row(const Acc* held, Number* out) const {
        const Acc* t = row_taps_;
        if constexpr (Up == 2) {
            const Acc *odd = held + (x_.first(1) - x_.first(0)), *te = t + x_.tap(0), *to = t + x_.tap(1);
            const Acc e0 = te[0], e1 = te[2], o0 = to[0], o1 = to[2];
            for (int64_t o = 0, m = 0; o < x_.out; o += kWritten, m += kVec) {
                const V a = e0 * load_vec(held + m) + e1 * load_vec(held + m + 1);
                const V b = o0 * load_vec(odd + m) + o1 * load_vec(odd + m + 1);
                store_vec<Number, Acc>(out + o, interleave<0, Acc>(a, b));
                store_vec<Number, Acc>(out + o + kVec, interleave<1, Acc>(a, b));
            }
        } else {
            const Acc t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
            const Acc *h1 = Down == 2 ? held + lane_ : held + 1, *h2 = Down == 2 ? held + 1 : held + 2, *h3 = h1 + (h2 - held);
            for (int64_t o = 0; o < x_.out; o += kWritten) {
                const V sum = t0 * load_vec(held + o) + t1 * load_vec(h1 + o);
                store_vec<Number, Acc>(out + o, sum + (t2 * load_vec(h2 + o) + t3 * load_vec(h3 + o)));
            }
        }
    }

    const FourTapAxis<Up, Down> x_, y_;
    const Number* const from_;
    Number* const to_;
    const Acc* const row_taps_;
    const int64_t planes_, threads_, numbers_;
    int64_t begin_, width_;  // samples of a row that count
    int64_t left_, lane_;    // zeros before them in a row in work; numbers of such a row, or of one of its two lanes
    int64_t one_, two_;      // where samples 0, 1, 2 … of it stand; for down 2 samples 0, 2, 4 … and 1, 3, 5 …
    int64_t read_, written_, tail_begin_;
    std::vector<Line> lines_;  // of every output row
    std::vector<Number> zeros_, tail_;  // for rows beside the image, and for rows near the end of the tensor
};

// (N, C, H, W) with rows of one or two vectors: along the rows first, straight from memory, with what lies beside a row
// masked out; then down the columns of the results, which stay in the first-level cache. Half the work of the above on
// planes of 4 × 4 to 16 × 16, where loops over rows are too short to pay for their own start.
template <int Up, int Down, class Number>
class FourTapNarrow {
    using Acc = typename AccOf<Number>::type;
    using V = Vec<Acc>;
    static constexpr int kVec = kLanes<Acc>, kMeet = 4 / Up;
    static constexpr int kOutputs = kVec / Down;  // of a vector; for down 2 every second lane is computed in vain
    static constexpr int64_t kMargin = 4 * kVec;  // numbers around a plane that may be read

public:
    static bool serves(const Upfirdn2dCall& call) {
        return call.out_w <= 2 * kOutputs && call.px0 >= 0 && call.px0 <= kVec && call.h * call.out_w <= kBand;
    }

    FourTapNarrow(const Upfirdn2dCall& call, const Acc* column_taps, const Acc* row_taps)
        : x_{call.w, call.out_w, call.px0},
          y_{call.h, call.out_h, call.py0},
          from_(reinterpret_cast<const Number*>(call.x)),
          to_(reinterpret_cast<Number*>(call.y)),
          planes_(call.n * call.c),
          threads_(call.threads),
          blocks_(ceil_div(call.out_w, kOutputs)) {
        for (int64_t row = 0; row < y_.out; ++row)
            for (int j = 0; j < kMeet; ++j) column_.push_back(column_taps[y_.tap(row) + j * Up]);
        for (int k = 0; k < 4; ++k) {
            const int64_t phase = Up == 2 ? k / 2 : 0, sample = Up == 2 ? k % 2 : k;
            taps_[k] = row_taps[x_.tap(phase) + sample * Up];
            for (int64_t block = 0; block < blocks_; ++block) {
                const int64_t first = x_.first(0) + block * kVec / Up;
                shift_[block][k] = first + x_.first(phase) - x_.first(0) + sample;
                for (int lane = 0; lane < kVec; ++lane) {
                    const int64_t at = shift_[block][k] + lane;
                    mask_[block][k][lane] = at >= 0 && at < x_.in ? -1 : 0;
                }
            }
        }
    }

    bool run() const {
        return share_rows(planes_, planes_ * y_.out * x_.out, threads_, [&](int64_t begin, int64_t end) {
            blocks_ == 1 ? run_planes<1>(begin, end) : run_planes<2>(begin, end);
        });
    }

private:
    template <int Blocks>
    void run_planes(int64_t begin, int64_t end) const {
        constexpr int64_t width = Blocks * kVec;
        const int64_t size = y_.in * x_.in, top = at_least(-y_.first(0), 0), start = y_.first(0) + top;
        const int64_t below = at_least(y_.first(y_.out - 1) + kMeet - y_.in, 0);
        std::vector<Acc> rows((top + y_.in + below) * width);  // zeros above and below stay as they are
        std::vector<Number> copy(size + 2 * kMargin), last(width);
        Number* const part_end = to_ + end * y_.out * x_.out;
        for (int64_t plane = begin; plane < end; ++plane) {
            const Number* from = from_ + plane * size;
            if (plane * size < kMargin || (planes_ - plane - 1) * size < kMargin) {
                std::copy(from, from + size, copy.begin() + kMargin);
                from = copy.data() + kMargin;
            }
            for (int64_t row = 0; row < y_.in; ++row)
                for (int block = 0; block < Blocks; ++block)
                    store_vec<Acc, Acc>(&rows[(top + row) * width + block * kVec], along(from + row * x_.in, block));
            Number* out = to_ + plane * y_.out * x_.out;
            for (int64_t row = 0; row < y_.out; ++row, out += x_.out) {
                const Acc* samples = rows.data() + (y_.first(row) - y_.first(0) + start) * width;
                const bool whole = out + Blocks * kVec <= part_end;
                for (int block = 0; block < Blocks; ++block)
                    down(samples + block * kVec, width, row, (whole ? out : last.data()) + block * kOutputs);
                if (!whole) std::copy(last.begin(), last.begin() + x_.out, out);
            }
        }
    }

    V term(const Number* row, int block, int k) const {
        using Bits = typename VecOf<Acc>::bits;
        Bits mask;
        memcpy(&mask, mask_[block][k], sizeof(mask));
        return taps_[k] * V(Bits(load_vec(row + shift_[block][k])) & mask);
    }

    V along(const Number* row, int block) const {
        const V a = term(row, block, 0) + term(row, block, 1), b = term(row, block, 2) + term(row, block, 3);
        if constexpr (Up == 2) return interleave<0, Acc>(a, b);
        else return a + b;
    }

    void down(const Acc* samples, int64_t width, int64_t row, Number* out) const {
        const Acc* t = &column_[row * kMeet];
        V sum = t[0] * load_vec(samples) + t[1] * load_vec(samples + width);
        if constexpr (kMeet == 4) sum += t[2] * load_vec(samples + 2 * width) + t[3] * load_vec(samples + 3 * width);
        store_vec<Number, Acc>(out, Down == 2 ? every_second<0, Acc>(sum, sum) : sum);
    }

    const FourTapAxis<Up, Down> x_, y_;
    const Number* const from_;
    Number* const to_;
    const int64_t planes_, threads_, blocks_;
    std::vector<Acc> column_;  // weights of the samples that meet every output row
    Acc taps_[4];              // for up 2 those of the even outputs, then of the odd ones
    int64_t shift_[2][4];      // where a block's samples for a tap begin, from the start of the row
    std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t> mask_[2][4][kVec];  // which of them lie in the row
};

// (N, H, W, C): pixels of so many channels that they are loops of their own. Column sums of the last four samples are
// kept, so memory is read in order and everything else happens in the first-level cache.
template <int Up, int Down, class Number>
class FourTapPixels {
    using Acc = typename AccOf<Number>::type;
    static constexpr int kMeet = 4 / Up;

public:
    FourTapPixels(const Upfirdn2dCall& call, const Acc* column_taps, const Acc* row_taps)
        : x_{call.w, call.out_w, call.px0},
          y_{call.h, call.out_h, call.py0},
          from_(reinterpret_cast<const Number*>(call.x)),
          to_(reinterpret_cast<Number*>(call.y)),
          column_taps_(column_taps),
          row_taps_(row_taps),
          images_(call.n),
          channels_(call.c),
          threads_(call.threads),
          zeros_(call.c) {}

    bool run() const {
        const int64_t rows = images_ * y_.out;
        return share_rows(rows, rows * x_.out * channels_, threads_, [&](int64_t begin, int64_t end) {
            std::vector<Acc> sums(4 * channels_);
            for (int64_t i = begin; i < end; ++i) output_row(i / y_.out, i % y_.out, sums.data());
        });
    }

private:
    void output_row(int64_t image, int64_t row, Acc* sums) const {
        const int64_t top = y_.first(row), column_tap = y_.tap(row);
        const Number* rows[kMeet];
        int64_t steps[kMeet];  // 0: the row lies beside the image
        Acc column[kMeet];
        for (int j = 0; j < kMeet; ++j) {
            const bool inside = top + j >= 0 && top + j < y_.in;
            rows[j] = inside ? from_ + (image * y_.in + top + j) * x_.in * channels_ : zeros_.data();
            steps[j] = inside ? channels_ : 0;
            column[j] = column_taps_[column_tap + j * Up];
        }
        Number* out = to_ + (image * y_.out + row) * x_.out * channels_;
        int64_t next = x_.first(0);
        for (int64_t o = 0; o < x_.out; ++o, out += channels_) {
            const int64_t first = x_.first(o), tap = x_.tap(o);
            for (; next < first + kMeet; ++next) {
                Acc* sum = sums + (next & 3) * channels_;
                if (next < 0 || next >= x_.in) {
                    std::fill(sum, sum + channels_, Acc(0));
                    continue;
                }
                const Number* pixels[kMeet];
                for (int j = 0; j < kMeet; ++j) pixels[j] = rows[j] + next * steps[j];
                sum_rows_fixed<kMeet, false>(sum, pixels, column, channels_);
            }
            const Acc* samples[kMeet];
            Acc taps[kMeet];
            for (int k = 0; k < kMeet; ++k) {
                samples[k] = sums + ((first + k) & 3) * channels_;
                taps[k] = row_taps_[tap + k * Up];
            }
            sum_rows_fixed<kMeet, false>(out, samples, taps, channels_);
        }
    }

    const FourTapAxis<Up, Down> x_, y_;
    const Number* const from_;
    Number* const to_;
    const Acc *const column_taps_, *const row_taps_;
    const int64_t images_, channels_, threads_;
    const std::vector<Number> zeros_;  // a pixel beside the image
};

}  // namespace refine
