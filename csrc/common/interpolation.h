// Bilinear resampling of an h x w map, as tables of where each output pixel reads.
#pragma once

#include <cstdint>

namespace fastmask {

// Where each of `out` output pixels reads: x[first] * (1 - weight) + x[second] * weight.
struct Interpolation {
  const int32_t* first;   // [out]
  const int32_t* second;  // [out]
  const float* weight;    // [out]
};

struct Resampling {
  int64_t h, w;           // logits
  Interpolation rows;     // [H]
  Interpolation columns;  // [W]
};

// Whole rows, padded to full vectors.
static constexpr int64_t padded_row(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace fastmask
