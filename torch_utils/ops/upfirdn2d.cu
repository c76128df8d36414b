// upfirdn2d on CUDA: the general kernels, whose bodies are in kernels.h and whose launch is planned in upfirdn2d.py, and
// those for frequent filters, which upfirdn2d_patches.py plans.

#include "packs.h"

namespace refine {

template <int Up, int Down, int Taps, class Number>
__global__ void __launch_bounds__(kTileThreads) tile_kernel(const TilesRecord record) {
    using Acc = typename AccOf<Number>::type;
    extern __shared__ double shared_bytes[];  // double: aligned for every Acc
    Acc* shared = reinterpret_cast<Acc*>(shared_bytes);
    const Tiles<Up, Down, Taps> tiles(record);
    for (int64_t block = blockIdx.x; block < tiles.blocks(); block += gridDim.x) {
        tile_load(tiles, block, threadIdx.x, kTileThreads, reinterpret_cast<const Number*>(record.x),
                  reinterpret_cast<const Acc*>(record.f), Acc(record.gain), shared);
        __syncthreads();
        tile_filter(tiles, block, threadIdx.x, kTileThreads, shared, reinterpret_cast<Number*>(record.y));
        __syncthreads();
    }
}

template <class Number>
__global__ void __launch_bounds__(kTileThreads) direct_kernel(const Upfirdn2dRecord record) {
    using Acc = typename AccOf<Number>::type;
    const int64_t outputs = record.n * record.c * record.out_h * record.out_w, step = int64_t(gridDim.x) * kTileThreads;
    for (int64_t i = int64_t(blockIdx.x) * kTileThreads + threadIdx.x; i < outputs; i += step)
        direct_output(record, i, reinterpret_cast<const Number*>(record.x), reinterpret_cast<const Acc*>(record.f),
                      reinterpret_cast<Number*>(record.y));
}

// ---------------------------------------------------------------------------------------------------------------------
// Few taps, where factors and taps are known to the compiler: a thread makes a patch of outputs, whose taps and samples
// it finds without a division. Places within an image are 32 bits wide.

struct PatchesRecord : Upfirdn2dRecord {
    int64_t planes;                         // of a block; pixels: packs of channels of a block
    int64_t patches_y, patches_x;           // of a block, beside each other
    int64_t tiles_y, tiles_x;               // blocks beside each other
    int64_t shift_y, shift_x;               // the first patch begins so many outputs before the image
    int64_t held_h, pitch;                  // planes: rows and columns of samples in shared memory
    int64_t by_rows, by_patches, by_patch;  // ⌈2^32 / d⌉ for d = held_h, patches_y · patches_x, patches_x
    int64_t whole_rows;                     // whether the rows of patches lie in memory as vectors
};

// i / d for i · d < 2^32
REFINE_DEVICE int quotient(int i, int64_t by) { return int(uint64_t(uint32_t(i)) * uint64_t(by) >> 32); }

// Along one axis, all known to the compiler: `Size` outputs, the first of which meets the first sample with tap 0.
template <int Up, int Down, int Taps, int Size>
struct Stretch {
    static constexpr int kSamples = ((Size - 1) * Down + Taps - 1) / Up + 1;
    static constexpr int kStep = Size * Down / Up;  // samples from patch to patch
    static_assert(Size * Down % Up == 0);

    // The tap with which an output takes a sample, or −1.
    static constexpr REFINE_DEVICE int tap(int output, int sample) {
        const int tap = sample * Up - output * Down;
        return tap >= 0 && tap < Taps ? tap : -1;
    }
};

// The taps in correlation order, gain included.
template <int Taps, class Acc>
REFINE_DEVICE void load_taps(const Upfirdn2dRecord& r, Acc (&f)[Taps][Taps]) {
    const Acc* from = reinterpret_cast<const Acc*>(r.f) + (r.flip ? 0 : Taps * Taps - 1);
    const int step = r.flip ? 1 : -1;
    REFINE_UNROLL
    for (int k = 0; k < Taps * Taps; ++k) f[k / Taps][k % Taps] = from[k * step] * Acc(r.gain);
}

[[maybe_unused]] constexpr int kPatchThreads = 128;
[[maybe_unused]] constexpr int kPlanePatch = 4, kPixelPatch = 2;  // outputs along each side

// Images as planes. A block copies the samples of its planes, or of its tile of one, into shared memory, with zeros where
// there is none; a thread has a patch.
template <int Up, int Down, int Taps, class Number>
__global__ void __launch_bounds__(kPatchThreads) plane_kernel(const PatchesRecord record) {
    using Acc = typename AccOf<Number>::type;
    constexpr int size = kPlanePatch;
    using Along = Stretch<Up, Down, Taps, size>;
    constexpr int most = 16 / sizeof(Acc), vector = Along::kStep % most ? 2 : most;  // samples that are read at once
    constexpr int vectors = (Along::kSamples + vector - 1) / vector;
    extern __shared__ double shared_bytes[];
    Acc* shared = reinterpret_cast<Acc*>(shared_bytes);
    Acc f[Taps][Taps];
    load_taps<Taps>(record, f);

    const int thread = threadIdx.x, pitch = int(record.pitch), held_h = int(record.held_h);
    const int h = int(record.h), w = int(record.w), out_h = int(record.out_h), out_w = int(record.out_w);
    const int patches_y = int(record.patches_y), patches_x = int(record.patches_x);
    const int tiles_x = int(record.tiles_x), tiles_y = int(record.tiles_y);
    int block = blockIdx.x;
    const int tile_x = block % tiles_x, rest = block / tiles_x, tile_y = rest % tiles_y;
    const int64_t first_plane = int64_t(rest / tiles_y) * record.planes, all_planes = record.n * record.c;
    const int planes = int(at_most(record.planes, all_planes - first_plane));
    const int out_x = tile_x * patches_x * size - int(record.shift_x);
    const int out_y = tile_y * patches_y * size - int(record.shift_y);
    const int in_x = (out_x * Down - int(record.px0)) / Up, in_y = (out_y * Down - int(record.py0)) / Up;  // exact

    // 16 threads have a row of samples.
    const Number* x = reinterpret_cast<const Number*>(record.x) + first_plane * (h * w);
    for (int line = thread / 16; line < planes * held_h; line += kPatchThreads / 16) {
        const int plane = quotient(line, record.by_rows), row = in_y + line - plane * held_h;
        const bool inside = unsigned(row) < unsigned(h);
        const Number* from = x + int64_t(plane) * (h * w) + row * w + in_x;
        for (int col = thread % 16; col < pitch; col += 16)
            shared[line * pitch + col] = inside && unsigned(in_x + col) < unsigned(w) ? Acc(load(from[col])) : Acc(0);
    }
    __syncthreads();

    const int patches = patches_y * patches_x;
    if (thread >= planes * patches) return;
    const int plane = quotient(thread, record.by_patches), patch = thread - plane * patches;
    const int patch_y = quotient(patch, record.by_patch), patch_x = patch - patch_y * patches_x;
    const Acc* corner = shared + (plane * held_h + patch_y * Along::kStep) * pitch + patch_x * Along::kStep;
    Acc sums[size][size] = {};
    REFINE_UNROLL
    for (int j = 0; j < Along::kSamples; ++j) {
        Acc samples[vectors * vector];
        REFINE_UNROLL
        for (int v = 0; v < vectors; ++v) {
            const auto pack = load_pack<Acc, vector>(corner + j * pitch + v * vector);
            REFINE_UNROLL
            for (int i = 0; i < vector; ++i) samples[v * vector + i] = pack.at(i);
        }
        REFINE_UNROLL
        for (int y = 0; y < size; ++y) {
            const int ky = Along::tap(y, j);
            if (ky < 0) continue;
            REFINE_UNROLL
            for (int i = 0; i < Along::kSamples; ++i) {
                REFINE_UNROLL
                for (int x = 0; x < size; ++x) {
                    const int kx = Along::tap(x, i);
                    if (kx >= 0) sums[y][x] += f[ky][kx] * samples[i];
                }
            }
        }
    }
    const int row = out_y + patch_y * size, col = out_x + patch_x * size;
    Number* y = reinterpret_cast<Number*>(record.y) + (first_plane + plane) * (out_h * out_w) + row * out_w + col;
    REFINE_UNROLL
    for (int j = 0; j < size; ++j) {
        if (unsigned(row + j) >= unsigned(out_h)) continue;
        if (record.whole_rows) {
            if (col < out_w) store_pack<Number, size>(y + j * out_w, sums[j]);
            continue;
        }
        REFINE_UNROLL
        for (int i = 0; i < size; ++i)
            if (unsigned(col + i) < unsigned(out_w)) store(&y[j * out_w + i], sums[j][i]);
    }
}

// Images as pixels: a thread has a patch of a pack of channels. Neighbours find their samples in the cache.
template <int Up, int Down, int Taps, class Number, bool Wide>
__global__ void __launch_bounds__(kPatchThreads) pixel_kernel(const PatchesRecord record) {
    using Acc = typename AccOf<Number>::type;
    constexpr int size = kPixelPatch, count = Wide ? 16 / sizeof(Number) : 1;
    using Along = Stretch<Up, Down, Taps, size>;
    Acc f[Taps][Taps];
    load_taps<Taps>(record, f);

    const int h = int(record.h), w = int(record.w), c = int(record.c);
    const int out_h = int(record.out_h), out_w = int(record.out_w);
    const int packs = int(record.planes), patches_x = int(record.patches_x), patches_y = int(record.patches_y);
    const int packs_of_all = c / count, groups = (packs_of_all + packs - 1) / packs;
    const int tiles_x = int(record.tiles_x), tiles_y = int(record.tiles_y);
    int rest = blockIdx.x;
    const int group = rest % groups;
    rest /= groups;
    const int tile_x = rest % tiles_x;
    rest /= tiles_x;
    const int tile_y = rest % tiles_y, image = rest / tiles_y;
    const int patch = threadIdx.x / packs, pack = group * packs + threadIdx.x - patch * packs;
    const int patch_y = quotient(patch, record.by_patch), patch_x = patch - patch_y * patches_x;
    const int row = (tile_y * patches_y + patch_y) * size - int(record.shift_y);
    const int col = (tile_x * patches_x + patch_x) * size - int(record.shift_x);
    if (pack >= packs_of_all || row >= out_h || col >= out_w) return;
    const int in_y = (row * Down - int(record.py0)) / Up, in_x = (col * Down - int(record.px0)) / Up;  // exact

    const Number* x = reinterpret_cast<const Number*>(record.x) + int64_t(image) * h * w * c + pack * count;
    Acc sums[size][size][count] = {};
    REFINE_UNROLL
    for (int j = 0; j < Along::kSamples; ++j) {
        if (unsigned(in_y + j) >= unsigned(h)) continue;
        Pack<Number, count> line[Along::kSamples];
        REFINE_UNROLL
        for (int i = 0; i < Along::kSamples; ++i)
            line[i] = unsigned(in_x + i) < unsigned(w)
                          ? load_pack<Number, count>(x + ((in_y + j) * w + in_x + i) * c)
                          : Pack<Number, count>{};
        REFINE_UNROLL
        for (int i = 0; i < Along::kSamples; ++i) {
            REFINE_UNROLL
            for (int k = 0; k < size * size; ++k) {
                const int ky = Along::tap(k / size, j), kx = Along::tap(k % size, i);
                if (ky < 0 || kx < 0) continue;
                REFINE_UNROLL
                for (int l = 0; l < count; ++l) sums[k / size][k % size][l] += f[ky][kx] * Acc(line[i].at(l));
            }
        }
    }
    Number* y = reinterpret_cast<Number*>(record.y) + int64_t(image) * out_h * out_w * c + pack * count;
    REFINE_UNROLL
    for (int k = 0; k < size * size; ++k) {
        const int to_y = row + k / size, to_x = col + k % size;
        if (unsigned(to_y) < unsigned(out_h) && unsigned(to_x) < unsigned(out_w))
            store_pack<Number, count>(y + (to_y * out_w + to_x) * c, sums[k / size][k % size]);
    }
}

}  // namespace refine
