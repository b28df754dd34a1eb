// The subset of CUDA needed to run the kernels of csrc/ on a CPU. Every CUDA thread is a
// coroutine, and blocks run one after another. It tests the results of a kernel, not its speed,
// races or memory model.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDACC__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidValue = 1;
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t code) { return code ? "invalid value" : "no error"; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return 0;
}

namespace on_cpu {
enum State { RUNS, AT_WARP, AT_BLOCK, DONE };
struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    State state = RUNS;
};
inline dim3 thread_index, block_index, block_size, grid_size;
inline uint4* shared = nullptr;
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<int> exchanged;
inline const std::function<void()>* running;

inline void wait(State at) {
    Thread& own = threads[thread_index.x];
    own.state = at;
    swapcontext(&own.context, &scheduler);
}

inline void whole_thread() {
    (*running)();
    wait(DONE);
}

// Resumes the threads first .. last if all of them that are not done wait at `at`.
inline void release(size_t first, size_t last, State at) {
    for (size_t t = first; t < last; ++t)
        if (threads[t].state != at && threads[t].state != DONE) return;
    for (size_t t = first; t < last; ++t)
        if (threads[t].state == at) threads[t].state = RUNS;
}

// Poisons shared memory before each block, so reads of unwritten elements are detected.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    block_size = block, grid_size = grid, running = &kernel;
    threads = std::vector<Thread>(block.x);
    exchanged.assign(block.x, 0);
    shared = static_cast<uint4*>(aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16));
    for (unsigned index = 0; index < grid.x * grid.y; ++index) {
        block_index = dim3(index % grid.x, index / grid.x, 0);
        memset(shared, 0xFF, shared_bytes);
        for (Thread& thread : threads) {
            thread.state = RUNS;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, whole_thread, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (unsigned t = 0; t < block.x; ++t) {
                if (threads[t].state != RUNS) continue;
                any = true;
                thread_index = dim3(t, 0, 0);
                swapcontext(&scheduler, &threads[t].context);
            }
            for (size_t first = 0; first < block.x; first += 32)
                release(first, first + 32 < block.x ? first + 32 : block.x, AT_WARP);
            release(0, block.x, AT_BLOCK);
        }
        for (const Thread& thread : threads)
            // A thread waits at a barrier that others never reach.
            if (thread.state != DONE) abort();
    }
    free(shared);
}

inline int from_lane(int value, int lane) {
    const unsigned first = thread_index.x / 32 * 32;
    exchanged[thread_index.x] = value;
    wait(AT_WARP);
    const int got = exchanged[first + unsigned(lane)];
    wait(AT_WARP);
    return got;
}
}  // namespace on_cpu

#define threadIdx on_cpu::thread_index
#define blockIdx on_cpu::block_index
#define blockDim on_cpu::block_size
#define gridDim on_cpu::grid_size
inline void __syncthreads() { on_cpu::wait(on_cpu::AT_BLOCK); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __shfl_sync(unsigned, int value, int lane) { return on_cpu::from_lane(value, lane); }
inline int __shfl_xor_sync(unsigned, int value, int mask) {
    return on_cpu::from_lane(value, int(threadIdx.x % 32) ^ mask);
}
inline int __shfl_up_sync(unsigned, int value, int step) {
    const int lane = int(threadIdx.x % 32);
    return on_cpu::from_lane(value, lane < step ? lane : lane - step);
}
