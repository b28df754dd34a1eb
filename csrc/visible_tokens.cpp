// The mask on the CPU. Every sample lists its visible tokens in its own range of a buffer. The
// ranges are then compacted.
#include "visible_tokens.h"

#include <algorithm>
#include <functional>
#include <vector>

extern "C" int iomm_visible_tokens_cpu(int64_t seed, const int64_t* n, int64_t batch, int64_t num_tokens, int64_t threshold,
                                       int64_t num_visible, int64_t capacity, int64_t* index, int32_t* offsets,
                                       int64_t* position, int64_t* overflow, int64_t threads) {
    std::vector<int32_t> lists(size_t(batch * num_tokens));
    // 65536 tokens take about 1 ms. Waking threads does not pay off for less.
    const bool many = batch * num_tokens > 65536;
#pragma omp parallel num_threads(int(threads)) if (threads > 1 && many)
    {
        std::vector<uint64_t> keys(size_t((num_tokens + iomm::CHUNK - 1) / iomm::CHUNK * iomm::CHUNK)), sorted;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            uint32_t u[iomm::CHUNK];
            for (int64_t first = 0; first < num_tokens; first += iomm::CHUNK) {
                iomm::chunk_uniforms24(uint64_t(seed), iomm::STREAM_MASK, uint64_t(n[b]), uint32_t(first / 4), u);
                for (int i = 0; i < iomm::CHUNK; ++i) keys[size_t(first + i)] = iomm::visible_key(u[i], uint32_t(first + i));
            }
            uint64_t least = iomm::bernoulli_threshold(threshold);
            if (num_visible == 0) least = iomm::NONE_VISIBLE;
            if (num_visible > 0) {
                sorted.assign(keys.begin(), keys.begin() + num_tokens);
                std::nth_element(sorted.begin(), sorted.begin() + (num_visible - 1), sorted.end(), std::greater<uint64_t>());
                least = sorted[size_t(num_visible - 1)];
            }
            int32_t* own = lists.data() + b * num_tokens;
            int64_t visible = 0;
            for (int64_t i = 0; i < num_tokens; ++i) {
                // Overwritten by the next token unless this one is visible.
                own[visible] = int32_t(i);
                visible += keys[size_t(i)] >= least;
            }
            offsets[b + 1] = int32_t(visible);
        }
    }
    offsets[0] = 0;
    int64_t start = 0, cut = 0;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t visible = offsets[b + 1], kept = std::min(visible, capacity - start);
        const int32_t* own = lists.data() + b * num_tokens;
        for (int64_t i = 0; i < kept; ++i) {
            position[start + i] = own[i];
            index[start + i] = b * num_tokens + own[i];
        }
        start += kept;
        cut += visible - kept;
        offsets[b + 1] = int32_t(start);
    }
    std::fill(index + start, index + capacity, 0);
    std::fill(position + start, position + capacity, 0);
    *overflow = cut;
    return 0;
}
