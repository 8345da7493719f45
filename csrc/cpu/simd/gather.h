// Vectors gathered from maps.
#pragma once

#include "common/points.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

// The values around each cell of a map: base[index] and base[index + 1], and those `stride` elements further.
struct Corners {
  vfloat upper_left, upper_right, lower_left, lower_right;
};

#if defined(__AVX512F__)
// first = base[index], second = base[index + 1]: one access for both.
static inline void gather_pairs(const float* base, vint index, vfloat& first, vfloat& second) {
  // Masked forms, because gcc 12 warns about undefined lanes in the others.
  const __m512i zero = _mm512_setzero_si512();
  const __m256i half = _mm512_castsi512_si256((__m512i)index);
  const __m256i rest = _mm512_extracti64x4_epi64((__m512i)index, 1);
  const __m512 low = (__m512)_mm512_mask_i32gather_epi64(zero, 0xff, half, base, 4);
  const __m512 high = (__m512)_mm512_mask_i32gather_epi64(zero, 0xff, rest, base, 4);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  first = (vfloat)_mm512_permutex2var_ps(low, even, high);
  second = (vfloat)_mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high);
}
#elif defined(__AVX2__)
// The same for the indices at[0..7]. A load for each pair takes less time than AVX2's gathers.
static inline void gather_pairs(const float* base, const uint32_t* at, vfloat& first, vfloat& second) {
  const auto two_pairs = [&](int i) {
    const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(base + at[i]));
    return _mm_loadh_pi((__m128)pair, reinterpret_cast<const __m64*>(base + at[i + 1]));
  };
  const __m256 even = _mm256_set_m128(two_pairs(4), two_pairs(0)), odd = _mm256_set_m128(two_pairs(6), two_pairs(2));
  first = (vfloat)_mm256_shuffle_ps(even, odd, 0x88);
  second = (vfloat)_mm256_shuffle_ps(even, odd, 0xdd);
}
#endif

static inline Corners gather_corners(const float* base, int32_t stride, vint index) {
  Corners corners;
#if defined(__AVX512F__)
  gather_pairs(base, index, corners.upper_left, corners.upper_right);
  gather_pairs(base + stride, index, corners.lower_left, corners.lower_right);
#elif defined(__AVX2__)
  uint32_t at[kLanes];  // unsigned indices need no extension to 64 bits
  memcpy(at, &index, sizeof at);
  gather_pairs(base, at, corners.upper_left, corners.upper_right);
  gather_pairs(base + stride, at, corners.lower_left, corners.lower_right);
#elif defined(FASTMASK_NEON)
  const auto pairs = [&](const float* from, vfloat& first, vfloat& second) {
    const float32x4_t low = vcombine_f32(vld1_f32(from + index[0]), vld1_f32(from + index[1]));
    const float32x4_t high = vcombine_f32(vld1_f32(from + index[2]), vld1_f32(from + index[3]));
    first = (vfloat)vuzp1q_f32(low, high);
    second = (vfloat)vuzp2q_f32(low, high);
  };
  pairs(base, corners.upper_left, corners.upper_right);
  pairs(base + stride, corners.lower_left, corners.lower_right);
#else
  for (int i = 0; i < kLanes; ++i) {
    const float* const at = base + index[i];
    corners.upper_left[i] = at[0];
    corners.upper_right[i] = at[1];
    corners.lower_left[i] = at[stride];
    corners.lower_right[i] = at[stride + 1];
  }
#endif
  return corners;
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

// Coordinates in 0..1 as positions relative to the first pixel, from -1 to `size`; -1 for NaN. Those relative to the
// border might have one bit of precision less.
static inline vfloat axis_positions(vfloat coordinates, vfloat size) {
  return minimum(maximum(fma(coordinates, size, splat(-0.5f)), splat(-1.0f)), size);
}

static inline Positions positions(vfloat coordinates, vfloat size) {
  const vfloat at = axis_positions(coordinates, size);
  const vint before = minimum(floor_to_int(at), __builtin_convertvector(size, vint) - 1);
  return {before + 1, at - __builtin_convertvector(before, vfloat)};
}

static inline Positions positions(vfloat coordinates, int64_t pixels) {
  return positions(coordinates, splat(static_cast<float>(pixels)));
}

// Bilinear samples of a map with a border of zeros and rows `stride` floats apart. Pixels of weight 0 are not read, as
// 0 * inf is NaN: those after a position exactly on a pixel, and those before one beyond the map.
static inline vfloat sample(const float* bordered, int32_t stride, Positions columns, Positions rows) {
  const auto [a, b, c, d] = gather_corners(bordered, stride, rows.first * stride + columns.first);
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
