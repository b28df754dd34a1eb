// Philox4x32-10 and its distributions, with one definition for the CPU and the GPU.
//
// The counter is (block, stream, n low, n high) and the key (seed low, seed high). Element e of
// sample n is lane e % 4 of block e / 4. Normals are computed in double and rounded once. Without
// FMA contraction every machine gets the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define IOMM_INLINE __host__ __device__ __forceinline__
#else
#define IOMM_INLINE inline __attribute__((always_inline))
#endif

namespace iomm {

struct Block {
    uint32_t word[4];
};

IOMM_INLINE Block philox(uint64_t seed, uint32_t stream, uint64_t n, uint32_t block) {
    uint32_t c0 = block, c1 = stream, c2 = uint32_t(n), c3 = uint32_t(n >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Block{{c0, c1, c2, c3}};
}

// The uniform of a word is uniform24 * 2^-24. Comparisons use the integer.
IOMM_INLINE uint32_t uniform24(uint32_t word) { return word >> 8; }

IOMM_INLINE float uniform(uint32_t word) { return float(uniform24(word)) * 0x1p-24f; }

// ln(x * 2^-24) for x = 1 .. 2^24, by the series of atanh on [1/sqrt 2, sqrt 2). The relative error
// is below 1e-10.
IOMM_INLINE double log_of_24_bits(uint32_t x) {
    const double value = double(int32_t(x));
    int64_t bits;
    memcpy(&bits, &value, 8);
    // Subtracting the bits of 1/sqrt(2) carries into the exponent if the mantissa reaches that of
    // sqrt(2).
    const int64_t half_root = 0x3FE6A09E00000000;
    const int32_t exponent = int32_t(uint64_t(bits - half_root) >> 32) >> 20;
    bits -= int64_t(uint64_t(int64_t(exponent)) << 52);
    double m;
    memcpy(&m, &bits, 8);
    const double s = (m - 1.0) / (m + 1.0), q = s * s;
    const double series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))));
    return double(exponent - 24) * 0.69314718055994530942 + 2.0 * s * series;
}

// Box-Muller. The angle is reduced to a quarter turn in integers, so its sine keeps full relative
// accuracy near zero.
IOMM_INLINE void normal_pair(uint32_t a, uint32_t b, float& even, float& odd) {
    const double radius = sqrt(-2.0 * log_of_24_bits((a >> 8) + 1));
    const int32_t turn = int32_t(b >> 8);
    const int32_t quarter = (turn + (1 << 21)) >> 22;
    const double x = double(turn - (quarter << 22)) * (6.28318530717958647692 * 0x1p-24), q = x * x;
    const double sine = x * (1.0 + q * (-1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880 + q * (-1.0 / 39916800))))));
    const double cosine = 1.0 + q * (-1.0 / 2 + q * (1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320 + q * (-1.0 / 3628800 + q * (1.0 / 479001600))))));
    const double c = quarter & 1 ? sine : cosine, s = quarter & 1 ? cosine : sine;
    even = float(radius * ((quarter + 1) & 2 ? -c : c));
    odd = float(radius * (quarter & 2 ? -s : s));
}

IOMM_INLINE void normals(const Block& block, float z[4]) {
    normal_pair(block.word[0], block.word[1], z[0], z[1]);
    normal_pair(block.word[2], block.word[3], z[2], z[3]);
}

#ifndef __CUDACC__
// Elements of CHUNK_BLOCKS blocks, in arrays that the compiler vectorises.
constexpr int CHUNK_BLOCKS = 64;
constexpr int CHUNK = 4 * CHUNK_BLOCKS;

inline __attribute__((always_inline)) void chunk_words(uint64_t seed, uint32_t stream, uint64_t n, uint32_t first,
                                                       uint32_t words[4][CHUNK_BLOCKS]) {
#pragma omp simd
    for (int i = 0; i < CHUNK_BLOCKS; ++i) {
        const Block block = philox(seed, stream, n, first + uint32_t(i));
        words[0][i] = block.word[0];
        words[1][i] = block.word[1];
        words[2][i] = block.word[2];
        words[3][i] = block.word[3];
    }
}

inline __attribute__((always_inline)) void chunk_uniforms24(uint64_t seed, uint32_t stream, uint64_t n, uint32_t first,
                                                            uint32_t u[CHUNK]) {
    uint32_t words[4][CHUNK_BLOCKS];
    chunk_words(seed, stream, n, first, words);
    for (int i = 0; i < CHUNK_BLOCKS; ++i)
        for (int lane = 0; lane < 4; ++lane) u[4 * i + lane] = uniform24(words[lane][i]);
}

inline __attribute__((always_inline)) void chunk_normals(uint64_t seed, uint32_t stream, uint64_t n, uint32_t first,
                                                         float z[CHUNK]) {
    uint32_t words[4][CHUNK_BLOCKS];
    float lanes[4][CHUNK_BLOCKS];
    chunk_words(seed, stream, n, first, words);
    for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
        for (int i = 0; i < CHUNK_BLOCKS; ++i)
            normal_pair(words[pair][i], words[pair + 1][i], lanes[pair][i], lanes[pair + 1][i]);
    }
    for (int i = 0; i < CHUNK_BLOCKS; ++i)
        for (int lane = 0; lane < 4; ++lane) z[4 * i + lane] = lanes[lane][i];
}
#endif

}  // namespace iomm
