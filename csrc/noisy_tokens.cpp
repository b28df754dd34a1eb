// Noisy tokens on the CPU. A chunk of noise stays in cache while its latents are read and both
// outputs are written.
#include "noisy_tokens.h"

namespace {

template <typename T>
int run(const T* latents, const float* t, int64_t seed, const int64_t* n, int64_t batch, iomm::Latents shape, T* noisy,
        T* target, int64_t threads) {
    const int64_t size = shape.size(), patch = shape.patch, chunks = (size + iomm::CHUNK - 1) / iomm::CHUNK;
    // 64 chunks take about 0.1 ms. Waking threads does not pay off for less.
    const bool many = batch * chunks > 64;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1 && many)
    for (int64_t task = 0; task < batch * chunks; ++task) {
        const int64_t b = task / chunks, chunk = task % chunks, first = chunk * iomm::CHUNK;
        const int64_t last = size - first < iomm::CHUNK ? size : first + iomm::CHUNK;
        float z[iomm::CHUNK];
        iomm::chunk_normals(uint64_t(seed), iomm::STREAM_NOISE, uint64_t(n[b]), uint32_t(chunk * iomm::CHUNK_BLOCKS), z);
        // `patch` consecutive values of a row stay adjacent in the token.
        for (int64_t e = first; e < last;) {
            const int64_t place = b * size + shape.token_place(e), within = e % shape.width % patch;
            const int64_t stop = e + patch - within < last ? e + patch - within : last;
            for (int64_t i = 0; e < stop; ++i, ++e) {
                const float x = iomm::load(latents[b * size + e]), noise = z[e - first];
                iomm::store(noisy + place + i, iomm::noisy_value(x, noise, t[b]));
                iomm::store(target + place + i, noise - x);
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" int iomm_noisy_tokens_cpu(const void* latents, const float* t, int64_t seed, const int64_t* n, int64_t batch,
                                     int64_t channels, int64_t height, int64_t width, int64_t patch, int64_t is_bfloat16,
                                     void* noisy, void* target, int64_t threads) {
    const iomm::Latents shape{channels, height, width, patch};
    if (is_bfloat16)
        return run(static_cast<const iomm::bfloat16*>(latents), t, seed, n, batch, shape, static_cast<iomm::bfloat16*>(noisy),
                   static_cast<iomm::bfloat16*>(target), threads);
    return run(static_cast<const float*>(latents), t, seed, n, batch, shape, static_cast<float*>(noisy),
               static_cast<float*>(target), threads);
}
