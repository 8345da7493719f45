// Maps of logits with a border of zeros, so that every point of the unit square lies between four of their pixels.
#pragma once

#include <cstdint>

namespace fastmask {

// Floats of such a map of h x w logits; rows may be written in steps of 16.
static constexpr int64_t bordered_size(int64_t h, int64_t w) { return (h + 2) * (w + 2) + 16; }

// A point whose weight, 1 less its share of void pixels, is below this has none: what is left is rounding.
constexpr float kLeastWeight = 1e-6f;

}  // namespace fastmask
