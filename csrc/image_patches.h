// One pixel value to one value of a ViT patch row.
#pragma once

#include "noisy_tokens.h"

namespace iomm {

// (value - mean) * scale, rounded after the difference and after the product, as PyTorch does it: the same bits everywhere.
struct Affine {
    float mean[3], scale[3];
};

struct Image {
    int64_t height, width, patch;
    IOMM_INLINE int64_t columns() const { return width / patch; }
    IOMM_INLINE int64_t rows() const { return height / patch; }
    IOMM_INLINE int64_t values() const { return 3 * patch * patch; }  // of a patch row, in order (channel, y, x)
};

}  // namespace iomm
