// Convert bytes (B, H, W, 3) to ViT patch rows on the GPU. A thread block handles 16 adjacent
// patches. Their 9 KB of bytes (patch 14) are read from memory once, and again from cache for the
// other channels.
#include <cuda_runtime.h>

#include "image_patches.h"

namespace {

// PATCHES is the number of patches per thread block.
constexpr int THREADS = 256, PATCHES = 16;

template <typename T, int SIDE>
struct alignas(SIDE * sizeof(T)) Several {
    T value[SIDE];
};

// The SIDE outputs of a thread are adjacent. The three channels are written out because a channel
// index known only at run time would move the kernel's arguments to local memory.
template <typename T, int SIDE>
__global__ void __launch_bounds__(THREADS) run(const uint8_t* pixels, iomm::Image image, iomm::Affine affine, T* patches) {
    const int patch = int(image.patch), area = patch * patch, values = 3 * area;
    const int columns = int(image.columns()), tiles = (columns + PATCHES - 1) / PATCHES;
    const int row = int(blockIdx.x) / tiles, column = int(blockIdx.x) % tiles * PATCHES;
    const int here = columns - column < PATCHES ? columns - column : PATCHES;
    const int64_t b = blockIdx.y;
    T* to = patches + ((b * image.rows() + row) * columns + column) * values;
    for (int first = int(threadIdx.x) * SIDE; first < here * values; first += THREADS * SIDE) {
        Several<T, SIDE> out;
        int token = first / values, c = first % values / area, y = first % area / patch, x = first % patch;
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            const int64_t line = b * image.height + int64_t(row) * patch + y, place = int64_t(column + token) * patch + x;
            const float value = float(pixels[(line * image.width + place) * 3 + c]);
            const float mean = c == 0 ? affine.mean[0] : c == 1 ? affine.mean[1] : affine.mean[2];
            const float scale = c == 0 ? affine.scale[0] : c == 1 ? affine.scale[1] : affine.scale[2];
            iomm::store(&out.value[i], (value - mean) * scale);
            if (++x == patch) x = 0, ++y;
            if (y == patch) y = 0, ++c;
            if (c == 3) c = 0, ++token;
        }
        *reinterpret_cast<Several<T, SIDE>*>(to + first) = out;
    }
}

template <typename T>
int launch(const uint8_t* pixels, int64_t batch, iomm::Image image, iomm::Affine affine, T* patches, cudaStream_t stream) {
    const int64_t tiles = image.rows() * ((image.columns() + PATCHES - 1) / PATCHES);
    if (batch == 0 || tiles == 0) return 0;
    if (batch > 65535 || tiles >= int64_t(1) << 31) return int(cudaErrorInvalidValue);
    const dim3 grid{unsigned(tiles), unsigned(batch)};
    if (uintptr_t(patches) % (4 * sizeof(T)) == 0 && image.values() % 4 == 0)
        run<T, 4><<<grid, THREADS, 0, stream>>>(pixels, image, affine, patches);
    else
        run<T, 1><<<grid, THREADS, 0, stream>>>(pixels, image, affine, patches);
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int iomm_image_patches_cuda(const void* pixels, int64_t batch, int64_t height, int64_t width, int64_t patch,
                                       double mean0, double mean1, double mean2, double scale0, double scale1, double scale2,
                                       int64_t is_bfloat16, void* patches, void* cuda_stream) {
    const iomm::Image image{height, width, patch};
    const iomm::Affine affine{{float(mean0), float(mean1), float(mean2)}, {float(scale0), float(scale1), float(scale2)}};
    const uint8_t* bytes = static_cast<const uint8_t*>(pixels);
    const cudaStream_t stream = cudaStream_t(cuda_stream);
    if (is_bfloat16) return launch(bytes, batch, image, affine, static_cast<iomm::bfloat16*>(patches), stream);
    return launch(bytes, batch, image, affine, static_cast<float*>(patches), stream);
}
