// Pixels to ViT patch rows (and VAE pixels) on the GPU. A thread block takes 16 patches side by side: their 9 KB of bytes
// (patch 14) come from memory once and are read again, for the other output and for the other channels, from cache.
#include <cuda_runtime.h>

#include "image_patches.h"

namespace {

constexpr int THREADS = 256, PATCHES = 16;  // patches of a thread block

struct Bytes {  // uint8, (H, W, 3)
    const uint8_t* pixels;
    __device__ float at(iomm::Image image, int64_t b, int c, int64_t y, int64_t x) const {
        return float(pixels[((b * image.height + y) * image.width + x) * 3 + c]);
    }
};

template <typename T>
struct Planes {  // float, (3, H, W)
    const T* pixels;
    __device__ float at(iomm::Image image, int64_t b, int c, int64_t y, int64_t x) const {
        return iomm::load(pixels[((b * 3 + c) * image.height + y) * image.width + x]);
    }
};

template <typename T, int SIDE>
struct alignas(SIDE * sizeof(T)) Several {
    T value[SIDE];
};

// SIDE outputs of a thread lie side by side. The three channels are spelled out: a channel chosen at run time would index
// the kernel's arguments in local memory.
template <typename T, typename Pixels, int SIDE>
__global__ void __launch_bounds__(THREADS) run(Pixels pixels, iomm::Image image, iomm::Affine affine, T* patches, T* vae) {
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
            const float value = pixels.at(image, b, c, int64_t(row) * patch + y, int64_t(column + token) * patch + x);
            const float scale = c == 0 ? affine.scale[0] : c == 1 ? affine.scale[1] : affine.scale[2];
            const float shift = c == 0 ? affine.shift[0] : c == 1 ? affine.shift[1] : affine.shift[2];
            iomm::store(&out.value[i], value * scale + shift);
            if (++x == patch) x = 0, ++y;
            if (y == patch) y = 0, ++c;
            if (c == 3) c = 0, ++token;
        }
        *reinterpret_cast<Several<T, SIDE>*>(to + first) = out;
    }
    if (vae == nullptr) return;
    const int width = here * patch;
    for (int first = int(threadIdx.x) * SIDE; first < 3 * patch * width; first += THREADS * SIDE) {
        const int c = first / (patch * width), y = first / width % patch, x = first % width;
        const int64_t line = int64_t(row) * patch + y, place = int64_t(column) * patch + x;
        Several<T, SIDE> out;
#pragma unroll
        for (int i = 0; i < SIDE; ++i)
            iomm::store(&out.value[i], pixels.at(image, b, c, line, place + i) * iomm::VAE_SCALE + iomm::VAE_SHIFT);
        *reinterpret_cast<Several<T, SIDE>*>(vae + ((b * 3 + c) * image.height + line) * image.width + place) = out;
    }
}

template <typename T, typename Pixels>
int launch(Pixels pixels, int64_t batch, iomm::Image image, iomm::Affine affine, T* patches, T* vae, cudaStream_t stream) {
    const int64_t tiles = image.rows() * ((image.columns() + PATCHES - 1) / PATCHES);
    if (batch == 0 || tiles == 0) return 0;
    if (batch > 65535 || tiles >= int64_t(1) << 31) return int(cudaErrorInvalidValue);
    const dim3 grid{unsigned(tiles), unsigned(batch)};
    const bool aligned = (uintptr_t(patches) | uintptr_t(vae)) % (4 * sizeof(T)) == 0;
    // Tiles of the VAE pixels begin at multiples of 16 patches, so four side by side need a width that 4 divides.
    if (aligned && image.values() % 4 == 0 && (vae == nullptr || image.width % 4 == 0))
        run<T, Pixels, 4><<<grid, THREADS, 0, stream>>>(pixels, image, affine, patches, vae);
    else
        run<T, Pixels, 1><<<grid, THREADS, 0, stream>>>(pixels, image, affine, patches, vae);
    return int(cudaGetLastError());
}

template <typename T>
int choose(const void* pixels, int64_t kind, int64_t batch, iomm::Image image, iomm::Affine affine, void* patches, void* vae,
           cudaStream_t stream) {
    T *rows = static_cast<T*>(patches), *latents = static_cast<T*>(vae);
    if (kind == 0) return launch(Bytes{static_cast<const uint8_t*>(pixels)}, batch, image, affine, rows, latents, stream);
    if (kind == 1)
        return launch(Planes<iomm::bfloat16>{static_cast<const iomm::bfloat16*>(pixels)}, batch, image, affine, rows, latents, stream);
    return launch(Planes<float>{static_cast<const float*>(pixels)}, batch, image, affine, rows, latents, stream);
}

}  // namespace

// kind: 0 uint8 (B, H, W, 3), 1 bfloat16 (B, 3, H, W), 2 float32 (B, 3, H, W). vae may be null.
extern "C" int iomm_image_patches_cuda(const void* pixels, int64_t kind, int64_t batch, int64_t height, int64_t width,
                                       int64_t patch, double scale0, double scale1, double scale2, double shift0,
                                       double shift1, double shift2, int64_t is_bfloat16, void* patches, void* vae,
                                       void* cuda_stream) {
    const iomm::Image image{height, width, patch};
    const iomm::Affine affine{{float(scale0), float(scale1), float(scale2)}, {float(shift0), float(shift1), float(shift2)}};
    const cudaStream_t stream = cudaStream_t(cuda_stream);
    if (is_bfloat16) return choose<iomm::bfloat16>(pixels, kind, batch, image, affine, patches, vae, stream);
    return choose<float>(pixels, kind, batch, image, affine, patches, vae, stream);
}
