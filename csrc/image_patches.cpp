// Convert bytes (B, H, W, 3) to ViT patch rows on the CPU. Each image row is split into its three
// channels while it is in cache.
#include "image_patches.h"

#include <vector>

namespace {

template <typename T>
int run(const uint8_t* pixels, int64_t batch, iomm::Image image, iomm::Affine affine, T* patches, int64_t threads) {
    const int64_t width = image.width, patch = image.patch, values = image.values();
    // 16384 pixels take about 0.1 ms. Waking threads does not pay off for less.
    const bool many = batch * image.height * width > 16384;
#pragma omp parallel num_threads(int(threads)) if (threads > 1 && many)
    {
        std::vector<float> plane(static_cast<size_t>(width));
        std::vector<T> line(static_cast<size_t>(width));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * image.height; ++task) {
            const int64_t b = task / image.height, y = task % image.height;
            const uint8_t* from = pixels + task * width * 3;
            for (int64_t c = 0; c < 3; ++c) {
                const float mean = affine.mean[c], scale = affine.scale[c];
                float* levels = plane.data();
                T* normalised = line.data();
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) levels[x] = float(from[3 * x + c]);
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) iomm::store(normalised + x, (levels[x] - mean) * scale);
                T* to = patches + ((b * image.rows() + y / patch) * image.columns()) * values + (c * patch + y % patch) * patch;
                for (int64_t column = 0; column < image.columns(); ++column)
                    memcpy(to + column * values, normalised + column * patch, size_t(patch) * sizeof(T));
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" int iomm_image_patches_cpu(const void* pixels, int64_t batch, int64_t height, int64_t width, int64_t patch,
                                      double mean0, double mean1, double mean2, double scale0, double scale1, double scale2,
                                      int64_t is_bfloat16, void* patches, int64_t threads) {
    const iomm::Image image{height, width, patch};
    const iomm::Affine affine{{float(mean0), float(mean1), float(mean2)}, {float(scale0), float(scale1), float(scale2)}};
    const uint8_t* bytes = static_cast<const uint8_t*>(pixels);
    if (is_bfloat16) return run(bytes, batch, image, affine, static_cast<iomm::bfloat16*>(patches), threads);
    return run(bytes, batch, image, affine, static_cast<float*>(patches), threads);
}
