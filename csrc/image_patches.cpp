// Pixels to ViT patch rows (and VAE pixels) on the CPU: an image row is split into its three channels while it is in cache.
#include "image_patches.h"

#include <vector>

namespace {

struct Bytes {  // uint8, (H, W, 3)
    const uint8_t* pixels;
    static constexpr bool has_vae = true;
    void row(iomm::Image image, int64_t b, int64_t y, float* planes) const {
        const uint8_t* from = pixels + (b * image.height + y) * image.width * 3;
        float *red = planes, *green = planes + image.width, *blue = planes + 2 * image.width;
#pragma omp simd
        for (int64_t x = 0; x < image.width; ++x) {
            red[x] = float(from[3 * x]);
            green[x] = float(from[3 * x + 1]);
            blue[x] = float(from[3 * x + 2]);
        }
    }
};

template <typename T>
struct Planes {  // float, (3, H, W)
    const T* pixels;
    static constexpr bool has_vae = false;
    void row(iomm::Image image, int64_t b, int64_t y, float* planes) const {
        for (int64_t c = 0; c < 3; ++c) {
            const T* from = pixels + ((b * 3 + c) * image.height + y) * image.width;
#pragma omp simd
            for (int64_t x = 0; x < image.width; ++x) planes[c * image.width + x] = iomm::load(from[x]);
        }
    }
};

template <typename T, typename Pixels>
int run(Pixels pixels, int64_t batch, iomm::Image image, iomm::Affine affine, T* patches, T* vae, int64_t threads) {
    const int64_t width = image.width, patch = image.patch, values = image.values();
    const bool many = batch * image.height * width > 16384;  // about 0.1 ms; less is not worth waking threads for
#pragma omp parallel num_threads(int(threads)) if (threads > 1 && many)
    {
        std::vector<float> planes(size_t(3 * width));
        std::vector<T> line(static_cast<size_t>(width));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * image.height; ++task) {
            const int64_t b = task / image.height, y = task % image.height;
            pixels.row(image, b, y, planes.data());
            for (int64_t c = 0; c < 3; ++c) {
                const float* from = planes.data() + c * width;
                const float scale = affine.scale[c], shift = affine.shift[c];
                T* normalised = line.data();
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) iomm::store(normalised + x, from[x] * scale + shift);
                T* to = patches + ((b * image.rows() + y / patch) * image.columns()) * values + (c * patch + y % patch) * patch;
                for (int64_t column = 0; column < image.columns(); ++column)
                    memcpy(to + column * values, normalised + column * patch, size_t(patch) * sizeof(T));
                if (Pixels::has_vae && vae != nullptr) {
                    T* row = vae + ((b * 3 + c) * image.height + y) * width;
#pragma omp simd
                    for (int64_t x = 0; x < width; ++x) iomm::store(row + x, from[x] * iomm::VAE_SCALE + iomm::VAE_SHIFT);
                }
            }
        }
    }
    return 0;
}

template <typename T>
int choose(const void* pixels, int64_t kind, int64_t batch, iomm::Image image, iomm::Affine affine, void* patches, void* vae,
           int64_t threads) {
    T *rows = static_cast<T*>(patches), *latents = static_cast<T*>(vae);
    if (kind == 0) return run(Bytes{static_cast<const uint8_t*>(pixels)}, batch, image, affine, rows, latents, threads);
    if (kind == 1)
        return run(Planes<iomm::bfloat16>{static_cast<const iomm::bfloat16*>(pixels)}, batch, image, affine, rows, latents, threads);
    return run(Planes<float>{static_cast<const float*>(pixels)}, batch, image, affine, rows, latents, threads);
}

}  // namespace

// kind: 0 uint8 (B, H, W, 3), 1 bfloat16 (B, 3, H, W), 2 float32 (B, 3, H, W). vae may be null.
extern "C" int iomm_image_patches_cpu(const void* pixels, int64_t kind, int64_t batch, int64_t height, int64_t width,
                                      int64_t patch, double scale0, double scale1, double scale2, double shift0,
                                      double shift1, double shift2, int64_t is_bfloat16, void* patches, void* vae,
                                      int64_t threads) {
    const iomm::Image image{height, width, patch};
    const iomm::Affine affine{{float(scale0), float(scale1), float(scale2)}, {float(shift0), float(shift1), float(shift2)}};
    if (is_bfloat16) return choose<iomm::bfloat16>(pixels, kind, batch, image, affine, patches, vae, threads);
    return choose<float>(pixels, kind, batch, image, affine, patches, vae, threads);
}
