// The original costs of one problem, as persons (the short side) by objects (the long side).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/logits.h"
#include "matcher/state.h"

namespace fastmask::matcher {

FASTMASK_HOST_DEVICE static inline int64_t element_size(Dtype type) {
  return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2;
}

struct Costs {
  const void* data;
  Dtype type;
  int32_t persons, objects;
  int64_t person_stride, object_stride;  // in elements
};

template <class Group>
FASTMASK_GROUP_FN double cost_at(const Costs& c, int32_t person, int32_t object) {
  const int64_t at = person * c.person_stride + object * c.object_stride;
  switch (c.type) {
    case Dtype::kFloat32:
      return static_cast<const float*>(c.data)[at];
    case Dtype::kFloat64:
      return static_cast<const double*>(c.data)[at];
    case Dtype::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(c.data)[at]);
    default:
      return half_to_float(static_cast<const uint16_t*>(c.data)[at]);
  }
}

template <class Group>
FASTMASK_GROUP_FN bool is_finite(double x) {
  return x - x == 0;
}

template <class Group>
FASTMASK_GROUP_FN double magnitude_of(double x) {
  return x < 0 ? -x : x;
}

// The largest power of two that scales `range` below 2^bits, capped to the range of float64.
template <class Group>
FASTMASK_GROUP_FN double scale_for(double range, int32_t bits) {
  if (range == 0) return 1;
  int64_t word;
  memcpy(&word, &range, sizeof word);
  const int64_t exponent = bits - (static_cast<int64_t>((word >> 52) & 0x7ff) - 1022);
  word = ((exponent < 1000 ? exponent : 1000) + 1023) << 52;
  double scale;
  memcpy(&scale, &word, sizeof scale);
  return scale;
}

}  // namespace fastmask::matcher
