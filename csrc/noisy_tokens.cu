// Noisy tokens on the GPU. A thread draws the four noise values of a Philox block and keeps them in
// registers.
//
// Latents are stored row by row, tokens patch by patch. A thread block therefore reads two rows of
// latents (a row of 2 x 2 patches) over all channels, transposes them in shared memory, and writes
// whole tokens, 16 bytes per thread. Other shapes, which no preset uses, are written value by
// value.
#include <cuda_runtime.h>

#include "noisy_tokens.h"

namespace {

// TILE is the number of latents per row of a tile.
constexpr int TILE = 64, THREADS = 256;

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T value[4];
};

template <typename T>
struct Tiled {
    // Keeps tokens aligned to 16 bytes and spreads them over the banks.
    static constexpr int PAD = 16 / sizeof(T);
    // Values per token, and distance between tokens in shared memory.
    int64_t values, stride;

    explicit Tiled(iomm::Latents shape) : values(shape.channels * 4), stride(values + PAD) {}
    size_t shared_bytes() const { return size_t(2 * (TILE / 2) * stride) * sizeof(T); }

    bool fits(iomm::Latents shape, int64_t batch, const void* a, const void* b, const void* c) const {
        const bool aligned = (uintptr_t(a) | uintptr_t(b) | uintptr_t(c)) % 16 == 0;
        return aligned && shape.patch == 2 && shape.width % 4 == 0 && values * sizeof(T) % 16 == 0 && batch <= 65535 &&
               shape.height / 2 * ((shape.width + TILE - 1) / TILE) < int64_t(1) << 31 && shared_bytes() <= 48 * 1024;
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) run_tiled(const T* latents, const float* t, uint64_t seed, const int64_t* n,
                                                     iomm::Latents shape, int stride, T* noisy, T* target) {
    extern __shared__ uint4 storage[];
    T* noisy_tile = reinterpret_cast<T*>(storage);
    T* target_tile = noisy_tile + TILE / 2 * stride;
    const int tiles = int((shape.width + TILE - 1) / TILE), values = int(4 * shape.channels);
    const int64_t b = blockIdx.y, row = blockIdx.x / tiles, column = int64_t(blockIdx.x % tiles) * TILE;
    const int width = int(shape.width - column < TILE ? shape.width - column : TILE), quads = width / 4;
    const float time = t[b];
    const uint64_t sample = uint64_t(n[b]);
    for (int task = threadIdx.x; task < quads * values / 2; task += THREADS) {
        const int quad = task % quads, p = task / quads % 2, c = task / quads / 2;
        const int64_t e = (c * shape.height + 2 * row + p) * shape.width + column + 4 * quad;
        const Four<T> x = *reinterpret_cast<const Four<T>*>(latents + b * shape.size() + e);
        float z[4];
        iomm::normals(iomm::philox(seed, iomm::STREAM_NOISE, sample, uint32_t(e / 4)), z);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const int place = (2 * quad + lane / 2) * stride + 4 * c + 2 * p + lane % 2;
            const float value = iomm::load(x.value[lane]);
            iomm::store(noisy_tile + place, iomm::noisy_value(value, z[lane], time));
            iomm::store(target_tile + place, z[lane] - value);
        }
    }
    __syncthreads();
    const int64_t first = b * shape.size() + (row * shape.width + column) * 2 * shape.channels;
    constexpr int VALUES = 16 / sizeof(T);
    for (int place = int(threadIdx.x) * VALUES; place < width / 2 * values; place += THREADS * VALUES) {
        const int from = place / values * stride + place % values;
        *reinterpret_cast<uint4*>(noisy + first + place) = *reinterpret_cast<const uint4*>(noisy_tile + from);
        *reinterpret_cast<uint4*>(target + first + place) = *reinterpret_cast<const uint4*>(target_tile + from);
    }
}

template <typename T>
__global__ void run(const T* latents, const float* t, uint64_t seed, const int64_t* n, int64_t batch, iomm::Latents shape,
                    T* noisy, T* target) {
    const int64_t size = shape.size(), blocks = (size + 3) / 4, total = batch * blocks;
    for (int64_t task = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; task < total; task += int64_t(gridDim.x) * blockDim.x) {
        const int64_t b = task / blocks, block = task % blocks;
        float z[4];
        iomm::normals(iomm::philox(seed, iomm::STREAM_NOISE, uint64_t(n[b]), uint32_t(block)), z);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const int64_t e = 4 * block + lane;
            if (e < size) {
                const float x = iomm::load(latents[b * size + e]);
                const int64_t place = b * size + shape.token_place(e);
                iomm::store(noisy + place, iomm::noisy_value(x, z[lane], t[b]));
                iomm::store(target + place, z[lane] - x);
            }
        }
    }
}

template <typename T>
int launch(const void* latents, const float* t, int64_t seed, const int64_t* n, int64_t batch, iomm::Latents shape, void* noisy,
           void* target, cudaStream_t stream) {
    const int64_t total = batch * ((shape.size() + 3) / 4), grid = (total + 255) / 256;
    if (total == 0) return 0;
    const T* from = static_cast<const T*>(latents);
    T *noisy_to = static_cast<T*>(noisy), *target_to = static_cast<T*>(target);
    const Tiled<T> tiled(shape);
    if (tiled.fits(shape, batch, latents, noisy, target)) {
        const dim3 tiles(unsigned(shape.height / 2 * ((shape.width + TILE - 1) / TILE)), unsigned(batch));
        run_tiled<T><<<tiles, THREADS, tiled.shared_bytes(), stream>>>(from, t, uint64_t(seed), n, shape, int(tiled.stride),
                                                                       noisy_to, target_to);
    } else {
        run<T><<<unsigned(grid < 65536 ? grid : 65536), 256, 0, stream>>>(from, t, uint64_t(seed), n, batch, shape, noisy_to,
                                                                          target_to);
    }
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int iomm_noisy_tokens_cuda(const void* latents, const float* t, int64_t seed, const int64_t* n, int64_t batch,
                                      int64_t channels, int64_t height, int64_t width, int64_t patch, int64_t is_bfloat16,
                                      void* noisy, void* target, void* cuda_stream) {
    const iomm::Latents shape{channels, height, width, patch};
    const cudaStream_t stream = cudaStream_t(cuda_stream);
    if (is_bfloat16) return launch<iomm::bfloat16>(latents, t, seed, n, batch, shape, noisy, target, stream);
    return launch<float>(latents, t, seed, n, batch, shape, noisy, target, stream);
}
