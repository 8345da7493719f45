// The costs of one problem as they came, seen as persons (the short side) by objects (the long side).
#pragma once

#include <cstdint>
#include <cstring>

#include "matcher/state.h"

namespace fastmask::matcher {

enum class CostType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Costs {
  const void* data;
  CostType type;
  int32_t persons, objects;
  int64_t person_stride, object_stride;  // in elements
};

template <class Group>
FASTMASK_GROUP_FN float float_of_bits(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

template <class Group>
FASTMASK_GROUP_FN float float_of_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  // Shifted up, the exponent is 112 too small, which the product mends, also for subnormal numbers.
  const float finite = float_of_bits<Group>(magnitude << 13) * 0x1p112f;
  const float value = magnitude >= 0x7c00 ? float_of_bits<Group>(0x7f800000 | (magnitude << 13)) : finite;
  return sign != 0 ? -value : value;
}

template <class Group>
FASTMASK_GROUP_FN double cost_at(const Costs& c, int32_t person, int32_t object) {
  const int64_t at = person * c.person_stride + object * c.object_stride;
  switch (c.type) {
    case CostType::kFloat32:
      return static_cast<const float*>(c.data)[at];
    case CostType::kFloat64:
      return static_cast<const double*>(c.data)[at];
    case CostType::kBFloat16:
      return float_of_bits<Group>(static_cast<uint32_t>(static_cast<const uint16_t*>(c.data)[at]) << 16);
    default:
      return float_of_half<Group>(static_cast<const uint16_t*>(c.data)[at]);
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

// The largest power of two that takes `range` below 2^bits; capped where it would leave float64.
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
