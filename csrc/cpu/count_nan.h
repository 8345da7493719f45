#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tiles.h"

namespace fastmask {

// How many of the logits of a plane's first `rows` rows are NaN.
FASTMASK_KERNEL(int64_t count_nan(const Plane& plane, int64_t rows, int64_t width))

}  // namespace fastmask
