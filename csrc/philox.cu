// Random numbers on the GPU. A thread draws the four elements of a block.
#include <cuda_runtime.h>

#include "philox.h"

#define IOMM_TEXT_(x) #x
#define IOMM_TEXT(x) IOMM_TEXT_(x)

namespace {

template <bool NORMAL>
__global__ void draw(uint64_t seed, uint32_t stream, const int64_t* n, int64_t batch, int64_t count, float* out) {
    const int64_t blocks = (count + 3) / 4, total = batch * blocks;
    for (int64_t task = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; task < total; task += int64_t(gridDim.x) * blockDim.x) {
        const int64_t b = task / blocks, block = task % blocks;
        const iomm::Block words = iomm::philox(seed, stream, uint64_t(n[b]), uint32_t(block));
        float values[4];
        if (NORMAL) {
            iomm::normals(words, values);
        } else {
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) values[lane] = iomm::uniform(words.word[lane]);
        }
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
            if (4 * block + lane < count) out[b * count + 4 * block + lane] = values[lane];
    }
}

template <bool NORMAL>
int launch(int64_t seed, int64_t stream, const int64_t* n, int64_t batch, int64_t count, float* out, cudaStream_t cuda_stream) {
    const int64_t total = batch * ((count + 3) / 4), grid = (total + 255) / 256;
    if (total == 0) return 0;
    draw<NORMAL><<<unsigned(grid < 65536 ? grid : 65536), 256, 0, cuda_stream>>>(uint64_t(seed), uint32_t(stream), n, batch, count, out);
    return int(cudaGetLastError());
}

}  // namespace

extern "C" const char* iomm_source_hash() { return IOMM_TEXT(IOMM_SOURCE_HASH); }

extern "C" const char* iomm_error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

// Returns 0 if the driver is new enough and the library contains code for this GPU.
extern "C" int iomm_probe() {
    cudaFuncAttributes attributes;
    return int(cudaFuncGetAttributes(&attributes, draw<true>));
}

extern "C" int iomm_philox_uniform_cuda(int64_t seed, int64_t stream, const int64_t* n, int64_t batch, int64_t count,
                                        float* out, void* cuda_stream) {
    return launch<false>(seed, stream, n, batch, count, out, cudaStream_t(cuda_stream));
}

extern "C" int iomm_philox_normal_cuda(int64_t seed, int64_t stream, const int64_t* n, int64_t batch, int64_t count,
                                       float* out, void* cuda_stream) {
    return launch<true>(seed, stream, n, batch, count, out, cudaStream_t(cuda_stream));
}
