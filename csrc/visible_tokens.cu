// The mask on the GPU: a thread block per sample, which finds its threshold, counts, and writes in order.
#include <cuda_runtime.h>

#include "visible_tokens.h"

namespace {

constexpr int THREADS = 256;

struct Mask {
    uint64_t seed;
    const int64_t* n;
    int64_t num_tokens;
    int64_t threshold;
    int64_t num_visible;  // -1: Bernoulli
};

__device__ uint64_t key_of(const Mask& mask, int64_t b, int64_t token) {
    const iomm::Block words = iomm::philox(mask.seed, iomm::STREAM_MASK, uint64_t(mask.n[b]), uint32_t(token / 4));
    const uint32_t low = token & 1 ? words.word[1] : words.word[0], high = token & 1 ? words.word[3] : words.word[2];
    return iomm::visible_key(iomm::uniform24(token & 2 ? high : low), uint32_t(token));
}

// How many tokens of sample b have a key of at least `least`; all threads get the answer.
__device__ int64_t count_visible(const Mask& mask, int64_t b, uint64_t least) {
    int64_t visible = 0;
    for (int64_t first = 0; first < mask.num_tokens; first += THREADS) {
        const int64_t token = first + threadIdx.x;
        visible += __syncthreads_count(token < mask.num_tokens && key_of(mask, b, token) >= least);
    }
    return visible;
}

// The num_visible-th largest key, bit by bit from the top: the keys are drawn again each time, nothing is stored.
__device__ uint64_t threshold_of(const Mask& mask, int64_t b) {
    if (mask.num_visible < 0) return iomm::bernoulli_threshold(mask.threshold);
    if (mask.num_visible == 0) return iomm::NONE_VISIBLE;
    int index_bits = 0;
    while (mask.num_tokens - 1 >> index_bits) ++index_bits;
    uint64_t least = 0xFFFFFFFFu >> index_bits << index_bits;  // set in every key
    for (int bit = 55; bit >= 0; --bit) {
        if (bit == 31) bit = index_bits - 1;
        if (bit < 0) break;
        const uint64_t trial = least | uint64_t(1) << bit;
        if (count_visible(mask, b, trial) >= mask.num_visible) least = trial;
    }
    return least;
}

// Exclusive prefix sum of one 0..n value per thread, and the sum; `sums` holds a value per warp.
__device__ int block_scan(int value, int* sums, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int running = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xFFFFFFFFu, running, step);
        if (lane >= step) running += below;
    }
    if (lane == 31) sums[warp] = running;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < THREADS / 32; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    __syncthreads();
    return before + running - value;
}

__global__ void count(Mask mask, int32_t* offsets) {
    const int64_t visible = count_visible(mask, blockIdx.x, threshold_of(mask, blockIdx.x));
    if (threadIdx.x == 0) offsets[blockIdx.x + 1] = int32_t(visible);
}

__global__ void accumulate(int64_t batch, int32_t* offsets) {
    __shared__ int sums[THREADS / 32];
    int before = 0;
    if (threadIdx.x == 0) offsets[0] = 0;
    for (int64_t first = 0; first < batch; first += THREADS) {
        const int64_t b = first + threadIdx.x;
        const int value = b < batch ? offsets[b + 1] : 0;
        int total;
        const int start = block_scan(value, sums, total);
        if (b < batch) offsets[b + 1] = before + start + value;
        before += total;
    }
}

__global__ void fill(Mask mask, const int32_t* offsets, int64_t* index, int64_t* position) {
    __shared__ int sums[THREADS / 32];
    const int64_t b = blockIdx.x;
    const uint64_t least = threshold_of(mask, b);
    int64_t before = offsets[b];
    for (int64_t first = 0; first < mask.num_tokens; first += THREADS) {
        const int64_t token = first + threadIdx.x;
        const bool visible = token < mask.num_tokens && key_of(mask, b, token) >= least;
        int total;
        const int64_t place = before + block_scan(visible, sums, total);
        if (visible) {
            position[place] = token;
            index[place] = b * mask.num_tokens + token;
        }
        before += total;
    }
}

}  // namespace

extern "C" int iomm_visible_tokens_cuda(int64_t seed, const int64_t* n, int64_t batch, int64_t num_tokens, int64_t threshold,
                                        int64_t num_visible, int64_t* index, int32_t* offsets, int64_t* position,
                                        void* cuda_stream) {
    const cudaStream_t stream = cudaStream_t(cuda_stream);
    const Mask mask{uint64_t(seed), n, num_tokens, threshold, num_visible};
    if (batch > 0) count<<<unsigned(batch), THREADS, 0, stream>>>(mask, offsets);
    accumulate<<<1, THREADS, 0, stream>>>(batch, offsets);
    if (batch > 0) fill<<<unsigned(batch), THREADS, 0, stream>>>(mask, offsets, index, position);
    return int(cudaGetLastError());
}
