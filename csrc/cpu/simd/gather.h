// Vectors gathered from maps.
#pragma once

#include "common/points.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

// first = base[index], second = base[index + 1]: one access for both.
static inline void gather_pairs(const float* base, vint index, vfloat& first, vfloat& second) {
#if defined(__AVX512F__)
  // Masked forms, because gcc 12 warns about undefined lanes in the others.
  const __m512i zero = _mm512_setzero_si512();
  const __m256i half = _mm512_castsi512_si256((__m512i)index);
  const __m256i rest = _mm512_extracti64x4_epi64((__m512i)index, 1);
  const __m512 low = (__m512)_mm512_mask_i32gather_epi64(zero, 0xff, half, base, 4);
  const __m512 high = (__m512)_mm512_mask_i32gather_epi64(zero, 0xff, rest, base, 4);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  first = (vfloat)_mm512_permutex2var_ps(low, even, high);
  second = (vfloat)_mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high);
#elif defined(FASTMASK_NEON)
  const float32x4_t low = vcombine_f32(vld1_f32(base + index[0]), vld1_f32(base + index[1]));
  const float32x4_t high = vcombine_f32(vld1_f32(base + index[2]), vld1_f32(base + index[3]));
  first = (vfloat)vuzp1q_f32(low, high);
  second = (vfloat)vuzp2q_f32(low, high);
#else
  for (int i = 0; i < kLanes; ++i) {
    first[i] = base[index[i]];
    second[i] = base[index[i] + 1];
  }
#endif
}

// The four bytes at each byte offset; offsets need not be aligned.
static inline vint gather_words(const uint8_t* base, vint offset) {
  return FASTMASK_BY_LEVEL((vint)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, (__m512i)offset, base, 1),
                           (vint)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)offset, 1),
                           by_lane([&](int i) { return load_as<int32_t>(base + offset[i]); }));
}

// The positions of coordinates in 0..1 on an axis of `size` pixels with a border pixel at each end: the first of the
// two pixels around each, 0..size, and the weight of the second. A coordinate off the map, or NaN, is on a border
// pixel.
struct Positions {
  vint first;
  vfloat weight;
};

static inline Positions positions(vfloat coordinates, vfloat size) {
  // Relative to the first pixel, not the border, whose extra half pixel might cost one bit of precision.
  vfloat at = fma(coordinates, size, splat(-0.5f));
  at = FASTMASK_CHOOSE(at > -1.0f, at, splat(-1.0f));
  at = FASTMASK_CHOOSE(at < size, at, size);
  vint first = __builtin_convertvector(at, vint) + 1;
  first = FASTMASK_CHOOSE(at < 0.0f, vint{}, first);
  const vint last = __builtin_convertvector(size, vint);
  first = first < last ? first : last;
  return {first, at - __builtin_convertvector(first - 1, vfloat)};
}

static inline Positions positions(vfloat coordinates, int64_t pixels) {
  return positions(coordinates, splat(static_cast<float>(pixels)));
}

// Bilinear samples of a map with a border of zeros and rows `stride` floats apart. Pixels of weight 0 are not read, as
// 0 * inf is NaN: those after a position exactly on a pixel, and those before one beyond the map.
static inline vfloat sample(const float* bordered, int32_t stride, Positions columns, Positions rows) {
  const vint index = rows.first * stride + columns.first;
  vfloat a, b, c, d;
  gather_pairs(bordered, index, a, b);
  gather_pairs(bordered, index + stride, c, d);
  const vint left = columns.weight < 1.0f, right = columns.weight > 0.0f;
  const vint above = rows.weight < 1.0f, below = rows.weight > 0.0f;
  const vfloat upper = fma(masked(right, b), columns.weight, masked(left, a) * (1.0f - columns.weight));
  const vfloat lower = fma(masked(right, d), columns.weight, masked(left, c) * (1.0f - columns.weight));
  return fma(masked(below, lower), rows.weight, masked(above, upper) * (1.0f - rows.weight));
}

// Copies a map into a border of zeros; `out` holds bordered_size(h, w) floats.
static inline void load_bordered(const Plane& plane, float* out) {
  const int64_t stride = plane.w + 2;
  memset(out, 0, sizeof(float) * stride);
  for (int64_t y = 0; y < plane.h; ++y) {
    float* row = out + (y + 1) * stride;
    row[0] = 0.0f;
    load_logits(row_of(plane, y), plane.w, row + 1);  // writes zeros up to a multiple of 16, before what follows
    row[plane.w + 1] = 0.0f;
  }
  memset(out + (plane.h + 1) * stride, 0, sizeof(float) * stride);
}

}  // namespace fastmask::FASTMASK_SIMD
