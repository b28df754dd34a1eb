// Conversion of one pixel value to one value of a ViT patch row.
#pragma once

#include "noisy_tokens.h"

namespace iomm {

// (value - mean) * scale, rounded after the difference and after the product like in PyTorch, so
// the bits are the same everywhere.
struct Affine {
    float mean[3], scale[3];
};

struct Image {
    int64_t height, width, patch;
    IOMM_INLINE int64_t columns() const { return width / patch; }
    IOMM_INLINE int64_t rows() const { return height / patch; }
    // Values per patch row, in the order (channel, y, x).
    IOMM_INLINE int64_t values() const { return 3 * patch * patch; }
};

}  // namespace iomm
