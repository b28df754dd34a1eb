// Tokens back to latents on the CPU: for every row of patches the tokens stay in cache while their rows are written.
#include "noisy_tokens.h"

namespace {

template <typename T>
int run(const T* tokens, int64_t batch, iomm::Latents shape, T* latents, int64_t threads) {
    const int64_t size = shape.size(), patch = shape.patch, rows = shape.height / patch, columns = shape.width / patch;
    const int64_t values = shape.channels * patch * patch;
    const bool many = batch * size > 65536;  // about 0.1 ms; less is not worth waking threads for
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1 && many)
    for (int64_t task = 0; task < batch * rows; ++task) {
        const int64_t b = task / rows, row = task % rows;
        const T* from = tokens + b * size + row * columns * values;
        for (int64_t c = 0; c < shape.channels; ++c) {
            for (int64_t p = 0; p < patch; ++p) {
                T* to = latents + b * size + (c * shape.height + row * patch + p) * shape.width;
                const T* piece = from + (c * patch + p) * patch;
                if (patch == 2) {
                    for (int64_t column = 0; column < columns; ++column) {
                        const T left = piece[column * values], right = piece[column * values + 1];
                        to[2 * column] = left;
                        to[2 * column + 1] = right;
                    }
                } else {
                    for (int64_t column = 0; column < columns; ++column)
                        memcpy(to + column * patch, piece + column * values, size_t(patch) * sizeof(T));
                }
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" int iomm_unpatch_cpu(const void* tokens, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                int64_t patch, int64_t value_bytes, void* latents, int64_t threads) {
    const iomm::Latents shape{channels, height, width, patch};
    if (value_bytes == 2)
        return run(static_cast<const uint16_t*>(tokens), batch, shape, static_cast<uint16_t*>(latents), threads);
    return run(static_cast<const uint32_t*>(tokens), batch, shape, static_cast<uint32_t*>(latents), threads);
}
