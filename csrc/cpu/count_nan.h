#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/simd.h"

namespace fastmask {

// How many of a plane's logits are NaN.
FASTMASK_KERNEL(int64_t count_nan(const Plane& plane))

}  // namespace fastmask
