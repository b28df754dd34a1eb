// Random numbers on the CPU. Rows of samples are cut into chunks, which are distributed over
// threads.
#include "philox.h"

#define IOMM_TEXT_(x) #x
#define IOMM_TEXT(x) IOMM_TEXT_(x)

namespace {

template <typename Fill>
int draw(const int64_t* n, int64_t batch, int64_t count, float* out, int64_t threads, Fill fill) {
    const int64_t chunks = (count + iomm::CHUNK - 1) / iomm::CHUNK;
    // 64 chunks take about 0.1 ms. Waking threads does not pay off for less.
    const bool many = batch * chunks > 64;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1 && many)
    for (int64_t task = 0; task < batch * chunks; ++task) {
        const int64_t b = task / chunks, chunk = task % chunks, first = chunk * iomm::CHUNK;
        const int64_t length = count - first < iomm::CHUNK ? count - first : iomm::CHUNK;
        float values[iomm::CHUNK];
        fill(uint64_t(n[b]), uint32_t(chunk * iomm::CHUNK_BLOCKS), values);
        memcpy(out + b * count + first, values, size_t(length) * sizeof(float));
    }
    return 0;
}

}  // namespace

extern "C" const char* iomm_source_hash() { return IOMM_TEXT(IOMM_SOURCE_HASH); }

extern "C" int iomm_philox_uniform_cpu(int64_t seed, int64_t stream, const int64_t* n, int64_t batch, int64_t count,
                                       float* out, int64_t threads) {
    return draw(n, batch, count, out, threads, [=](uint64_t sample, uint32_t block, float* values) {
        uint32_t u[iomm::CHUNK];
        iomm::chunk_uniforms24(uint64_t(seed), uint32_t(stream), sample, block, u);
        for (int i = 0; i < iomm::CHUNK; ++i) values[i] = float(int32_t(u[i])) * 0x1p-24f;
    });
}

extern "C" int iomm_philox_normal_cpu(int64_t seed, int64_t stream, const int64_t* n, int64_t batch, int64_t count,
                                      float* out, int64_t threads) {
    return draw(n, batch, count, out, threads, [=](uint64_t sample, uint32_t block, float* values) {
        iomm::chunk_normals(uint64_t(seed), uint32_t(stream), sample, block, values);
    });
}
