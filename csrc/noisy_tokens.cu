// Noisy tokens on the GPU: a thread draws the four noise values of a Philox block and keeps them in registers.
#include <cuda_runtime.h>

#include "noisy_tokens.h"

namespace {

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
           void* target, void* cuda_stream) {
    const int64_t total = batch * ((shape.size() + 3) / 4), grid = (total + 255) / 256;
    if (total == 0) return 0;
    run<T><<<unsigned(grid < 65536 ? grid : 65536), 256, 0, cudaStream_t(cuda_stream)>>>(
        static_cast<const T*>(latents), t, uint64_t(seed), n, batch, shape, static_cast<T*>(noisy), static_cast<T*>(target));
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int iomm_noisy_tokens_cuda(const void* latents, const float* t, int64_t seed, const int64_t* n, int64_t batch,
                                      int64_t channels, int64_t height, int64_t width, int64_t patch, int64_t is_bfloat16,
                                      void* noisy, void* target, void* cuda_stream) {
    const iomm::Latents shape{channels, height, width, patch};
    if (is_bfloat16) return launch<iomm::bfloat16>(latents, t, seed, n, batch, shape, noisy, target, cuda_stream);
    return launch<float>(latents, t, seed, n, batch, shape, noisy, target, cuda_stream);
}
