// Reads logits as float, and writes gradients in the logits' type.
#pragma once

#include "common/logits.h"
#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

// Reads `count` logits as float32; the rest up to a multiple of 16 becomes 0.
static inline void load_logits(Logits logits, int64_t count, float* out) {
  int64_t i = 0;
  const uint16_t* const source = static_cast<const uint16_t*>(logits.data) + logits.offset;
  if (logits.dtype == Dtype::kFloat32) {
    memcpy(out, static_cast<const float*>(logits.data) + logits.offset, count * sizeof(float));
    i = count;
  } else if (logits.dtype == Dtype::kBFloat16) {
    for (; i < count; ++i) out[i] = bfloat16_to_float(source[i]);
  } else {
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    }
#elif defined(FASTMASK_NEON)
    for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + i))));
#endif
    for (; i < count; ++i) out[i] = half_to_float(source[i]);
  }
  for (; i % 16 != 0; ++i) out[i] = 0.0f;
}

// Writes `count` floats from element `offset` on, rounded to nearest even.
static inline void store_logits(const float* in, int64_t count, void* logits, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::kFloat32) {
    memcpy(static_cast<float*>(logits) + offset, in, count * sizeof(float));
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(logits) + offset;
  int64_t i = 0;
  if (dtype == Dtype::kFloat16) {
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
    }
#elif defined(FASTMASK_NEON)
    for (; i + 4 <= count; i += 4) vst1_u16(target + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
#endif
    for (; i < count; ++i) target[i] = float_to_half(in[i]);
  } else {
    for (; i < count; ++i) target[i] = float_to_bfloat16(in[i]);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
