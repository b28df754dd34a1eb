// An image token is visible if its key reaches the threshold of its sample.
#pragma once

#include "philox.h"

namespace iomm {

constexpr uint32_t STREAM_MASK = 0;

// Orders tokens by their uniform, and ties by lower index first. The keys of a sample are unique.
IOMM_INLINE uint64_t visible_key(uint32_t u24, uint32_t token) { return uint64_t(u24) << 32 | (0xFFFFFFFFu - token); }

// Bernoulli: a token is hidden if u24 < threshold, regardless of its index.
IOMM_INLINE uint64_t bernoulli_threshold(int64_t threshold) { return uint64_t(threshold) << 32; }

constexpr uint64_t NONE_VISIBLE = ~uint64_t(0);

}  // namespace iomm
