// The mask on the GPU, in one launch of one thread block. A warp per sample counts, the block
// accumulates the counts, and a warp per sample writes. One block is enough because 32 samples of
// 256 tokens are only 8192 numbers, and the work depends on nothing else.
#include <cuda_runtime.h>

#include "visible_tokens.h"

namespace {

constexpr int WARPS = 32, LANES = 32;
constexpr unsigned ALL = 0xFFFFFFFFu;

struct Mask {
    uint64_t seed;
    const int64_t* n;
    int64_t num_tokens;
    int64_t threshold;
    // -1 for Bernoulli.
    int64_t num_visible;
};

// Returns the visible ones of tokens 4 block .. 4 block + 3 of sample b as bits. They are a lane's
// share of 128 tokens.
__device__ unsigned visible_bits(const Mask& mask, int64_t b, int64_t block, uint64_t least) {
    const iomm::Block words = iomm::philox(mask.seed, iomm::STREAM_MASK, uint64_t(mask.n[b]), uint32_t(block));
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t token = 4 * block + i;
        const bool visible = iomm::visible_key(iomm::uniform24(words.word[i]), uint32_t(token)) >= least;
        bits |= unsigned(visible && token < mask.num_tokens) << i;
    }
    return bits;
}

// Returns the number of tokens of sample b with a key of at least `least`, to the whole warp.
__device__ int count_visible(const Mask& mask, int64_t b, uint64_t least) {
    int visible = 0;
    for (int64_t block = threadIdx.x % LANES; 4 * block < mask.num_tokens; block += LANES)
        visible += __popc(visible_bits(mask, b, block, least));
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) visible += __shfl_xor_sync(ALL, visible, step);
    return visible;
}

// Returns the num_visible-th largest key. It is found bit by bit from the top. The keys are drawn
// again for every bit, and nothing is stored.
__device__ uint64_t threshold_of(const Mask& mask, int64_t b) {
    if (mask.num_visible < 0) return iomm::bernoulli_threshold(mask.threshold);
    if (mask.num_visible == 0) return iomm::NONE_VISIBLE;
    int index_bits = 0;
    while (mask.num_tokens - 1 >> index_bits) ++index_bits;
    // These bits are set in every key.
    uint64_t least = 0xFFFFFFFFu >> index_bits << index_bits;
    for (int bit = 55; bit >= 0; --bit) {
        if (bit == 31) bit = index_bits - 1;
        if (bit < 0) break;
        const uint64_t trial = least | uint64_t(1) << bit;
        if (count_visible(mask, b, trial) >= mask.num_visible) least = trial;
    }
    return least;
}

// Returns the sum over the lower lanes, and the sum over all lanes in `total`.
__device__ int warp_scan(int value, int& total) {
    int running = value;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const int below = __shfl_up_sync(ALL, running, step);
        if (int(threadIdx.x % LANES) >= step) running += below;
    }
    total = __shfl_sync(ALL, running, LANES - 1);
    return running - value;
}

// The first warp turns counts into offsets, limited to the capacity.
__device__ void accumulate(int64_t batch, int64_t capacity, int32_t* offsets, int64_t* overflow) {
    int64_t before = 0;
    if (threadIdx.x == 0) offsets[0] = 0;
    for (int64_t first = 0; first < batch; first += LANES) {
        const int64_t b = first + threadIdx.x;
        const int value = b < batch ? offsets[b + 1] : 0;
        int total;
        const int64_t end = before + warp_scan(value, total) + value;
        if (b < batch) offsets[b + 1] = int32_t(end < capacity ? end : capacity);
        before += total;
    }
    if (threadIdx.x == 0) *overflow = before > capacity ? before - capacity : 0;
}

__global__ void __launch_bounds__(WARPS* LANES) pack(Mask mask, int64_t batch, int64_t capacity, int64_t* index,
                                                    int32_t* offsets, int64_t* position, int64_t* overflow) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int64_t b = warp; b < batch; b += WARPS) {
        int visible = int(mask.num_visible);
        if (visible < 0) visible = count_visible(mask, b, iomm::bernoulli_threshold(mask.threshold));
        if (lane == 0) offsets[b + 1] = visible;
    }
    __syncthreads();
    if (warp == 0) accumulate(batch, capacity, offsets, overflow);
    __syncthreads();
    for (int64_t b = warp; b < batch; b += WARPS) {
        const uint64_t least = threshold_of(mask, b);
        int64_t before = offsets[b];
        for (int64_t first = 0; 4 * first < mask.num_tokens; first += LANES) {
            const unsigned bits = visible_bits(mask, b, first + lane, least);
            int total;
            int64_t place = before + warp_scan(__popc(bits), total);
            for (int i = 0; i < 4; ++i) {
                if ((bits >> i & 1) && place < capacity) {
                    const int64_t token = 4 * (first + lane) + i;
                    position[place] = token;
                    index[place++] = b * mask.num_tokens + token;
                }
            }
            before += total;
        }
    }
    for (int64_t i = offsets[batch] + threadIdx.x; i < capacity; i += WARPS * LANES) index[i] = position[i] = 0;
}

}  // namespace

extern "C" int iomm_visible_tokens_cuda(int64_t seed, const int64_t* n, int64_t batch, int64_t num_tokens, int64_t threshold,
                                        int64_t num_visible, int64_t capacity, int64_t* index, int32_t* offsets,
                                        int64_t* position, int64_t* overflow, void* cuda_stream) {
    const Mask mask{uint64_t(seed), n, num_tokens, threshold, num_visible};
    pack<<<1, WARPS * LANES, 0, cudaStream_t(cuda_stream)>>>(mask, batch, capacity, index, offsets, position, overflow);
    return int(cudaGetLastError());
}
