// Tokens back to latents on the GPU. A thread block takes a row of patches over all channels, so that the parts of a token
// that one warp leaves are read by the next from cache; a thread writes four latents side by side.
#include <cuda_runtime.h>

#include "noisy_tokens.h"

namespace {

constexpr int TILE = 64, THREADS = 256;  // latents along a row of a tile

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T value[4];
};

template <typename T>
__global__ void __launch_bounds__(THREADS) run_tiled(const T* tokens, iomm::Latents shape, T* latents) {
    const int tiles = int((shape.width + TILE - 1) / TILE), values = int(4 * shape.channels);
    const int64_t row = blockIdx.x / tiles, column = int64_t(blockIdx.x % tiles) * TILE;
    const int width = int(shape.width - column < TILE ? shape.width - column : TILE), quads = width / 4;
    tokens += int64_t(blockIdx.y) * shape.size() + (row * shape.width + column) * 2 * shape.channels;
    latents += int64_t(blockIdx.y) * shape.size();
    for (int task = threadIdx.x; task < quads * values / 2; task += THREADS) {
        const int quad = task % quads, p = task / quads % 2, c = task / quads / 2;
        const T* from = tokens + int64_t(2 * quad) * values + 4 * c + 2 * p;
        const Four<T> four{{from[0], from[1], from[values], from[values + 1]}};
        *reinterpret_cast<Four<T>*>(latents + (c * shape.height + 2 * row + p) * shape.width + column + 4 * quad) = four;
    }
}

template <typename T>
__global__ void run(const T* tokens, int64_t batch, iomm::Latents shape, T* latents) {
    const int64_t size = shape.size(), total = batch * size;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x)
        latents[i] = tokens[i / size * size + shape.token_place(i % size)];
}

template <typename T>
int launch(const void* tokens, int64_t batch, iomm::Latents shape, void* latents, cudaStream_t stream) {
    const int64_t total = batch * shape.size(), tiles = shape.height / 2 * ((shape.width + TILE - 1) / TILE);
    if (total == 0) return 0;
    const bool aligned = uintptr_t(latents) % (4 * sizeof(T)) == 0;
    if (aligned && shape.patch == 2 && shape.width % 4 == 0 && batch <= 65535 && tiles < int64_t(1) << 31) {
        run_tiled<T><<<dim3(unsigned(tiles), unsigned(batch)), THREADS, 0, stream>>>(static_cast<const T*>(tokens), shape,
                                                                                     static_cast<T*>(latents));
    } else {
        const int64_t grid = (total + 255) / 256;
        run<T><<<unsigned(grid < 65536 ? grid : 65536), 256, 0, stream>>>(static_cast<const T*>(tokens), batch, shape,
                                                                          static_cast<T*>(latents));
    }
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int iomm_unpatch_cuda(const void* tokens, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                 int64_t patch, int64_t value_bytes, void* latents, void* cuda_stream) {
    const iomm::Latents shape{channels, height, width, patch};
    const cudaStream_t stream = cudaStream_t(cuda_stream);
    if (value_bytes == 2) return launch<uint16_t>(tokens, batch, shape, latents, stream);
    return launch<uint32_t>(tokens, batch, shape, latents, stream);
}
