// One pixel value to one value of a ViT patch row.
#pragma once

#include "noisy_tokens.h"

namespace iomm {

// value * scale + shift, rounded after the product and after the sum, as PyTorch does it: the same bits everywhere.
struct Affine {
    float scale[3], shift[3];
};

struct Image {
    int64_t height, width, patch;
    IOMM_INLINE int64_t columns() const { return width / patch; }
    IOMM_INLINE int64_t rows() const { return height / patch; }
    IOMM_INLINE int64_t values() const { return 3 * patch * patch; }  // of a patch row, in order (channel, y, x)
};

constexpr float VAE_SCALE = 2.0f / 255.0f, VAE_SHIFT = -1.0f;

}  // namespace iomm
