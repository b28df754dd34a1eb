// What decides whether an image token is visible: its key reaches the threshold of its sample.
#pragma once

#include "philox.h"

namespace iomm {

constexpr uint32_t STREAM_MASK = 0;

// Orders tokens by their uniform and, where those are equal, lower index first. No two tokens of a sample share a key.
IOMM_INLINE uint64_t visible_key(uint32_t u24, uint32_t token) { return uint64_t(u24) << 32 | (0xFFFFFFFFu - token); }

// Bernoulli: hidden where u24 < threshold, whatever the index.
IOMM_INLINE uint64_t bernoulli_threshold(int64_t threshold) { return uint64_t(threshold) << 32; }

constexpr uint64_t NONE_VISIBLE = ~uint64_t(0);

}  // namespace iomm
