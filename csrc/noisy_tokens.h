// Conversion of one latent value to one value of a noisy token and of its target.
#pragma once

#include "philox.h"

namespace iomm {

constexpr uint32_t STREAM_NOISE = 2;

struct Latents {
    int64_t channels, height, width, patch;
    IOMM_INLINE int64_t size() const { return channels * height * width; }
    // Index of element e of (C, H, W) in tokens of order "c (h p) (w q) -> (h w) (c p q)".
    IOMM_INLINE int64_t token_place(int64_t e) const {
        const int64_t w = e % width, h = e / width % height, c = e / width / height;
        const int64_t token = h / patch * (width / patch) + w / patch;
        return (token * channels + c) * patch * patch + h % patch * patch + w % patch;
    }
};

IOMM_INLINE float noisy_value(float x, float z, float t) { return (1.0f - t) * x + t * z; }

// bfloat16 is represented by its bits because the CPU compiler has no type for it. Rounds to
// nearest, ties to even, like PyTorch.
struct bfloat16 {
    uint16_t bits;
};

IOMM_INLINE float load(float x) { return x; }

IOMM_INLINE float load(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

IOMM_INLINE void store(float* to, float value) { *to = value; }

IOMM_INLINE void store(bfloat16* to, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    to->bits = value != value ? uint16_t(0x7FC0) : uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace iomm
