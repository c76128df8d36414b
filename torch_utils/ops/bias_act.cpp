// bias_act on the CPU, forward and derivatives: one pass over memory, all threads, no branches per element.
//
// Work goes in pieces that fit the first-level cache: x + b into a buffer, the activation's loop over it, then the sums
// for db. So only the activations' loops exist once per activation, and half precision costs no loops of its own.

#include <algorithm>
#include <new>
#include <vector>

#include "vectors.h"

namespace refine {
namespace {

constexpr int64_t kPiece = 1024;        // numbers of a piece
constexpr int64_t kShortRow = 32;       // rows shorter than this are served from a repeated bias
constexpr int64_t kSmallTensor = 32768;  // not worth waking threads

template <class Acc>
using Loop = void (*)(const Acc* z, const Acc* dy, const Acc* g, Acc* out, int64_t length, const Epilogue<Acc>& e);

template <int A, int Order, bool Clamped, class Acc>
void activation_loop(const Acc* z, const Acc* dy, const Acc* g, Acc* out, int64_t length, const Epilogue<Acc>& e) {
    const Epilogue<Acc> epilogue = e;  // a local copy: nothing that `out` could alias
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
        const Acc first = Order > 0 ? dy[i] : Acc(0), second = Order > 1 ? g[i] : Acc(0);
        out[i] = bias_act_element<A, Order, Clamped>(z[i], first, second, epilogue);
    }
}

template <int A, class Acc>
Loop<Acc> loop_of_order(int64_t order, bool clamped) {
    if (order == 0) return clamped ? activation_loop<A, 0, true, Acc> : activation_loop<A, 0, false, Acc>;
    if (order == 1) return clamped ? activation_loop<A, 1, true, Acc> : activation_loop<A, 1, false, Acc>;
    return clamped ? activation_loop<A, 2, true, Acc> : activation_loop<A, 2, false, Acc>;
}

template <class Acc>
Loop<Acc> loop_of(const BiasActCall& call) {
    const bool clamped = call.clamp >= 0;
    switch (call.act) {
        case kLinear: return loop_of_order<kLinear, Acc>(call.order, clamped);
        case kRelu: return loop_of_order<kRelu, Acc>(call.order, clamped);
        case kLrelu: return loop_of_order<kLrelu, Acc>(call.order, clamped);
        case kTanh: return loop_of_order<kTanh, Acc>(call.order, clamped);
        case kSigmoid: return loop_of_order<kSigmoid, Acc>(call.order, clamped);
        case kElu: return loop_of_order<kElu, Acc>(call.order, clamped);
        case kSelu: return loop_of_order<kSelu, Acc>(call.order, clamped);
        case kSoftplus: return loop_of_order<kSoftplus, Acc>(call.order, clamped);
        case kSwish: return loop_of_order<kSwish, Acc>(call.order, clamped);
    }
    return nullptr;
}

// The frequent activations also take x and its bias as they are: `one` for all numbers, or b[i] each.
template <class Acc>
using BiasedLoop = void (*)(const Acc* x, const Acc* b, Acc one, Acc* out, int64_t length, const Epilogue<Acc>& e);

template <int A, bool Clamped, class Acc>
void biased_loop(const Acc* x, const Acc* b, Acc one, Acc* out, int64_t length, const Epilogue<Acc>& e) {
    const Epilogue<Acc> epilogue = e;
    if (b) {
#pragma GCC ivdep
        for (int64_t i = 0; i < length; ++i)
            out[i] = bias_act_element<A, 0, Clamped>(x[i] + b[i], Acc(0), Acc(0), epilogue);
    } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < length; ++i)
            out[i] = bias_act_element<A, 0, Clamped>(x[i] + one, Acc(0), Acc(0), epilogue);
    }
}

template <class Acc>
BiasedLoop<Acc> biased_loop_of(const BiasActCall& call) {
    const bool clamped = call.clamp >= 0;
    if (call.order != 0) return nullptr;
    if (call.act == kLinear) return clamped ? biased_loop<kLinear, true, Acc> : biased_loop<kLinear, false, Acc>;
    if (call.act == kLrelu) return clamped ? biased_loop<kLrelu, true, Acc> : biased_loop<kLrelu, false, Acc>;
    return nullptr;
}

template <class Number>
class Pass {
    using Acc = typename AccOf<Number>::type;
    static constexpr bool kConverts = sizeof(Number) < sizeof(Acc);

public:
    Pass(const BiasActCall& call, Loop<Acc> loop)
        : call_(call),
          loop_(loop),
          biased_(kConverts ? nullptr : biased_loop_of<Acc>(call)),
          x_(reinterpret_cast<const Number*>(call.x)),
          b_(reinterpret_cast<const Number*>(call.b)),
          dy_(reinterpret_cast<const Number*>(call.dy)),
          g_(reinterpret_cast<const Number*>(call.g)),
          out_(reinterpret_cast<Number*>(call.out)),
          numbers_(call.outer * call.channels * call.inner),
          epilogue_{Acc(call.alpha), Acc(call.gain), Acc(call.clamp)} {}

    void run() const {
        if (!b_ && !call_.db)
            run_flat();
        else if (call_.inner >= kShortRow)
            run_rows();
        else
            run_repeated();
    }

private:
    struct Buffers {
        Acc z[kPiece], dy[kPiece], g[kPiece], out[kPiece];
    };

    int threads(int64_t parts) const {
        return numbers_ < kSmallTensor ? 1 : int(at_least(at_most(call_.threads, parts), 1));
    }

    // Where `length` numbers of a tensor can be read as Acc: there, or in `buffer`.
    static const Acc* as_acc(const Number* from, Acc* buffer, int64_t length) {
        if (!from) return buffer;
        if constexpr (kConverts) {
            load_many(from, buffer, length);
            return buffer;
        } else {
            return from;
        }
    }

    // One piece, given z = x + b. Returns the results as Acc.
    const Acc* piece(int64_t first, int64_t length, const Acc* z, Buffers& work) const {
        const Acc* dy = as_acc(dy_ ? dy_ + first : nullptr, work.dy, length);
        const Acc* g = as_acc(g_ ? g_ + first : nullptr, work.g, length);
        if constexpr (kConverts) {
            loop_(z, dy, g, work.out, length, epilogue_);
            Number* __restrict__ out = out_ + first;
            store_many(work.out, out, length);
            return work.out;
        } else {
            loop_(z, dy, g, out_ + first, length, epilogue_);
            return out_ + first;
        }
    }

    const Acc* piece_with_one_bias(int64_t first, int64_t length, Acc b, Buffers& work) const {
        if (b == Acc(0)) return piece(first, length, as_acc(x_ + first, work.z, length), work);
        if constexpr (!kConverts) {
            if (biased_) {
                biased_(x_ + first, nullptr, b, out_ + first, length, epilogue_);
                return out_ + first;
            }
        }
        const Acc* x = as_acc(x_ + first, work.z, length);
        for (int64_t i = 0; i < length; ++i) work.z[i] = x[i] + b;
        return piece(first, length, work.z, work);
    }

    const Acc* piece_with_biases(int64_t first, int64_t length, const Acc* biases, Buffers& work) const {
        if constexpr (!kConverts) {
            if (biased_) {
                biased_(x_ + first, biases, Acc(0), out_ + first, length, epilogue_);
                return out_ + first;
            }
        }
        const Acc* x = as_acc(x_ + first, work.z, length);
        for (int64_t i = 0; i < length; ++i) work.z[i] = x[i] + biases[i];
        return piece(first, length, work.z, work);
    }

    void run_flat() const {
        const int64_t parts = ceil_div(numbers_, kPiece);
#pragma omp parallel for num_threads(threads(parts)) if (threads(parts) > 1) schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            Buffers work;
            piece_with_one_bias(part * kPiece, std::min(kPiece, numbers_ - part * kPiece), Acc(0), work);
        }
    }

    // Long rows of one bias each. A piece's sum goes into double, so the sums do not depend on the threads.
    void run_rows() const {
        const int64_t inner = call_.inner, pieces = ceil_div(inner, kPiece);
        const int64_t parts = call_.outer * call_.channels * pieces;
        std::vector<double> sums(call_.db ? parts : 0);
#pragma omp parallel for num_threads(threads(parts)) if (threads(parts) > 1) schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            Buffers work;
            const int64_t row = part / pieces, from = part % pieces * kPiece, length = std::min(kPiece, inner - from);
            const Acc b = b_ ? Acc(load(b_[row % call_.channels])) : Acc(0);
            const Acc* out = piece_with_one_bias(row * inner + from, length, b, work);
            if (!call_.db) continue;
            Acc total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < length; ++i) total += out[i];
            sums[part] = total;
        }
        if (!call_.db) return;
        std::vector<double> db(call_.channels);
        for (int64_t part = 0; part < parts; ++part) db[part / pieces % call_.channels] += sums[part];
        store_sums(db);
    }

    // Short rows: the biases of channels × inner numbers, repeated to a line that is worth a loop.
    void run_repeated() const {
        const int64_t period = call_.channels * call_.inner;
        const int64_t repeats = at_least(at_most(kPiece / period, call_.outer), 1), line = period * repeats;
        std::vector<Acc> biases(line);
        for (int64_t c = 0; c < call_.channels && b_; ++c)
            std::fill_n(&biases[c * call_.inner], call_.inner, Acc(load(b_[c])));
        for (int64_t i = period; i < line; i += period) std::copy_n(biases.begin(), period, biases.begin() + i);
        const int64_t lines = ceil_div(numbers_, line);
        // At most 32 partial sums however many threads there are, so the result does not depend on them.
        const int64_t block = call_.db ? at_least(ceil_div(lines, 32), 8) : 1, parts = ceil_div(lines, block);
        std::vector<double> totals(call_.db ? parts * call_.channels : 0);
        std::vector<Acc> all_sums(call_.db ? parts * line : 0);
#pragma omp parallel for num_threads(threads(parts)) if (threads(parts) > 1) schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            Buffers work;
            Acc* sums = call_.db ? &all_sums[part * line] : nullptr;
            const int64_t end = std::min((part + 1) * block, lines);
            for (int64_t k = part * block; k < end; ++k) {
                for (int64_t i = 0; i < std::min(line, numbers_ - k * line); i += kPiece) {
                    const int64_t first = k * line + i, length = std::min({kPiece, line - i, numbers_ - first});
                    const Acc* out = piece_with_biases(first, length, &biases[i], work);
                    if (sums) add(sums + i, out, length);
                }
                if (sums && (k % 64 == 63 || k == end - 1)) flush(sums, line, period, &totals[part * call_.channels]);
            }
        }
        if (!call_.db) return;
        std::vector<double> db(call_.channels);
        for (int64_t i = 0; i < parts * call_.channels; ++i) db[i % call_.channels] += totals[i];
        store_sums(db);
    }

    static void add(Acc* __restrict__ sums, const Acc* __restrict__ values, int64_t length) {
        for (int64_t i = 0; i < length; ++i) sums[i] += values[i];
    }

    // Float sums of few numbers each go into double.
    void flush(Acc* __restrict__ sums, int64_t line, int64_t period, double* __restrict__ totals) const {
        for (int64_t i = 0; i < line && call_.inner == 1; i += period)
            for (int64_t c = 0; c < call_.channels; ++c) totals[c] += sums[i + c];
        for (int64_t i = 0; i < line && call_.inner > 1; i += period)
            for (int64_t c = 0; c < call_.channels; ++c)
                for (int64_t j = 0; j < call_.inner; ++j) totals[c] += sums[i + c * call_.inner + j];
        std::fill(sums, sums + line, Acc(0));
    }

    void store_sums(const std::vector<double>& db) const {
        Number* out = reinterpret_cast<Number*>(call_.db);
        for (int64_t c = 0; c < call_.channels; ++c) store(&out[c], Acc(db[c]));
    }

    const BiasActCall& call_;
    const Loop<Acc> loop_;
    const BiasedLoop<Acc> biased_;  // null: there is none
    const Number *x_, *b_, *dy_, *g_;
    Number* out_;
    const int64_t numbers_;
    const Epilogue<Acc> epilogue_;
};

template <class Number>
int run(const BiasActCall& call) {
    const auto loop = loop_of<typename AccOf<Number>::type>(call);
    if (!loop) return kBadActivation;
    Pass<Number>(call, loop).run();
    return kOk;
}

}  // namespace
}  // namespace refine

extern "C" int refine_bias_act(const void* packed) {
    using namespace refine;
    BiasActCall call;
    memcpy(&call, packed, sizeof(call));
    if (call.outer * call.channels * call.inner == 0) return kOk;
    try {
        switch (call.dtype) {
            case kFloat32: return run<float>(call);
            case kFloat64: return run<double>(call);
            case kFloat16: return run<Float16>(call);
            case kBFloat16: return run<BFloat16>(call);
        }
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kBadDType;
}
