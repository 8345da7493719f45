// The logits that kernels read, and scalar conversions between their types and float.
//
// The functions are static: every translation unit, compiled for its own SIMD level, has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/carver.h"

namespace fastmask {

// The type of logits or costs; only costs may be float64.
enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Logits of a tensor, from element `offset` on.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t offset;
};

// The logits of one query, [h, w] with rows `row_stride` elements apart.
struct Plane {
  Logits logits;
  int64_t h, w, row_stride;
};

static inline Logits after(Logits logits, int64_t elements) {
  return {logits.data, logits.dtype, logits.offset + elements};
}

static inline Logits row_of(const Plane& plane, int64_t y) { return after(plane.logits, y * plane.row_stride); }

FASTMASK_HOST_DEVICE static inline float float_of_bits(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

[[maybe_unused]] FASTMASK_HOST_DEVICE static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of_bits(sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13));
}

[[maybe_unused]] FASTMASK_HOST_DEVICE static inline float bfloat16_to_float(uint16_t bfloat) {
  return float_of_bits(static_cast<uint32_t>(bfloat) << 16);
}

// Rounds to nearest even, like the hardware.
[[maybe_unused]] static inline uint16_t float_to_half(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  const uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00;   // NaN
  if (word >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (word < 0x38800000) {                       // below 2^-14: subnormal
    float magnitude;
    memcpy(&magnitude, &word, sizeof magnitude);
    magnitude += 0.5f;  // the sum's last mantissa bit is 2^-24, so the addition rounds as wanted
    memcpy(&word, &magnitude, sizeof word);
    return sign | static_cast<uint16_t>(word - 0x3f000000);
  }
  const uint32_t odd = (word >> 13) & 1;
  return sign | static_cast<uint16_t>((word - 0x38000000 + 0xfff + odd) >> 13);
}

[[maybe_unused]] static inline uint16_t float_to_bfloat16(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

}  // namespace fastmask
