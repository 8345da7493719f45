// Vectors of the SIMD level that this file is compiled for, and the special functions that the kernels need.
//
// Only functions of this level's namespace may be defined here: an inline function shared between levels would be
// merged by the linker into one copy, compiled for whichever level came first.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#if defined(__clang__)
// Vectors in arguments: no function of a level is called from another one.
#pragma GCC diagnostic ignored "-Wpsabi"
#else
// GCC warns of its own intrinsics, such as _mm512_min_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace fastmask::FASTMASK_SIMD {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using vfloat = float __attribute__((vector_size(4 * kLanes)));
using vint = int32_t __attribute__((vector_size(4 * kLanes)));
using vuint = uint32_t __attribute__((vector_size(4 * kLanes)));
using vbyte = uint8_t __attribute__((vector_size(kLanes)));

// Minus 0 changes no x, not even -0, so the compiler leaves a plain broadcast.
static inline vfloat splat(float x) { return x - vfloat{}; }
static inline vint splat(int32_t x) { return vint{} + x; }

static inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

// kLanes bytes, each widened to 32 bits.
static inline vint load_bytes(const uint8_t* p) {
  vbyte v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vint);
}

static inline vint bits(vfloat v) {
  vint i;
  memcpy(&i, &v, sizeof i);
  return i;
}

static inline vfloat from_bits(vint i) {
  vfloat v;
  memcpy(&v, &i, sizeof v);
  return v;
}

// Lane i is lane kLane[i] of a followed by b. GCC has the builtin of Clang from version 12 on.
template <int... kLane, class V>
static inline V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, vint{kLane...});
#endif
}

// One step of a transposition: the blocks off the diagonal of each 2 kStep x 2 kStep square change places.
template <int kStep, class V, int... kLane>
static inline void swap_blocks(V& a, V& b, std::integer_sequence<int, kLane...>) {
  const V low = shuffle<((kLane & kStep) == 0 ? kLane : kLanes + kLane - kStep)...>(a, b);
  b = shuffle<((kLane & kStep) == 0 ? kLane + kStep : kLanes + kLane)...>(a, b);
  a = low;
}

// Element j of vector i becomes element i of vector j.
template <int kStep = kLanes / 2, class V>
static inline void transpose(V (&v)[kLanes]) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) swap_blocks<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes>{});
    }
    transpose<kStep / 2>(v);
  }
}

// a * b + c, rounded once where the level has such an instruction.
static inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// As the instruction has it: b where either is NaN.
static inline vfloat minimum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static inline vfloat maximum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The first `count` < kLanes elements, and 0.
static inline vfloat load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  vfloat v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

static inline void store_some(float* p, vfloat v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

static inline vint load(const int32_t* p) {
  vint v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(int32_t* p, vint v) { memcpy(p, &v, sizeof v); }

// p[index] of each lane.
static inline vfloat gather(const float* p, vint index) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_i32gather_ps((__m512i)index, p, 4);
#elif defined(__AVX2__)
  return (vfloat)_mm256_i32gather_ps(p, (__m256i)index, 4);
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[index[i]];
  return v;
#endif
}

// value with the bits of `mask` replaced by `tag`, which has no others.
static inline vfloat with_tag(vfloat value, vint tag, vint mask) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_ternarylogic_epi32((__m512i)value, (__m512i)tag, (__m512i)mask, 0xDC);
#else
  return from_bits((bits(value) & ~mask) | tag);
#endif
}

// Bit i is set where lane i of a comparison holds.
static inline uint32_t lane_bits(vint comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)comparison));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(comparison[i] & 1) << i;
  return mask;
#endif
}

// The sum over the lanes, in a fixed order.
static inline double sum_lanes(vfloat v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// All ones in the lanes of part `part` of a chunk of lanes that the bits of `lanes` name.
static inline vint select(uint32_t lanes, int part) {
  vint lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  return ((splat(static_cast<int32_t>(lanes >> (part * kLanes))) & lane_bit) != 0);
}

static inline vfloat masked(vint mask, vfloat v) { return mask ? v : vfloat{}; }

// a + b modulo 2^32. Signed sums must not overflow, not even in a lane whose result is not used.
static inline vint wrapping_sum(vint a, vint b) { return (vint)((vuint)a + (vuint)b); }

// 2^n, given n + 1.5 * 2^23, for n in -126..127.
static inline vfloat power_of_two(vfloat rounded) {
  return from_bits((vint)(((vuint)bits(rounded) << 23) + (vuint)splat(int32_t{127 << 23})));
}

// exp(-a) for a >= 0: 2^n times a degree-6 minimax polynomial on [-1/2, 1/2] (relative error 2e-9 before rounding).
// Below 2^-126 the result stays there; NaN stays NaN.
static inline vfloat exp_neg(vfloat a) {
  vfloat t = a * -1.44269504f;
  t = t < -126.0f ? splat(-126.0f) : t;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat rounded = t + magic;
  const vfloat f = fma(a, splat(-1.92596299e-08f), fma(a, splat(-1.44269504f), magic - rounded));
  const vfloat fraction = t == -126.0f ? vfloat{} : f;
  vfloat y = splat(1.5345811821e-04f);
  y = fma(y, fraction, splat(1.3399931218e-03f));
  y = fma(y, fraction, splat(9.6184889578e-03f));
  y = fma(y, fraction, splat(5.5503287770e-02f));
  y = fma(y, fraction, splat(2.4022646891e-01f));
  y = fma(y, fraction, splat(6.9314720574e-01f));
  y = fma(y, fraction, splat(1.0f));
  return y * power_of_two(rounded);
}

// What every mask term needs of a logit x, from one exponential and one division.
struct Sigmoid {
  vfloat p;             // sigmoid(x)
  vfloat q;             // 1 - p = sigmoid(-x)
  vfloat softplus_pos;  // softplus(x) = log(1 + exp(x)) = -log(q)
  vfloat softplus_neg;  // softplus(-x) = -log(p)
};

// With e = exp(-|x|): sigmoid(|x|) = 1 / (1 + e), and log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, by a
// degree-4 minimax polynomial in s^2 (relative error 4e-9 before rounding, also where e is tiny). One division
// 1 / ((1 + e) (2 + e)) serves both.
static inline Sigmoid sigmoid(vfloat x) {
  const vint negative = x < 0.0f;
  const vfloat magnitude = negative ? -x : x;
  const vfloat e = exp_neg(magnitude);
  const vfloat one_e = e + 1.0f;
  const vfloat two_e = e + 2.0f;
  const vfloat r = 1.0f / (one_e * two_e);
  const vfloat large = two_e * r;  // sigmoid(|x|)
  const vfloat small = e * large;  // sigmoid(-|x|)
  const vfloat s = e * (one_e * r);
  const vfloat u = s * s;
  vfloat y = splat(2.8178334886e-01f);
  y = fma(y, u, splat(2.7960602759e-01f));
  y = fma(y, u, splat(4.0024910282e-01f));
  y = fma(y, u, splat(6.6666314682e-01f));
  y = fma(y, u, splat(2.0f));
  const vfloat log1p_e = y * s;
  return {negative ? small : large, negative ? large : small, (negative ? vfloat{} : x) + log1p_e,
          (negative ? magnitude : vfloat{}) + log1p_e};
}

// sigmoid(x) alone, for x that is no NaN: 1 / (1 + 2^n y) with 2^n y = exp(-x) as in exp_neg. 0 below -87.
static inline vfloat logistic(vfloat x) {
  const vfloat clamped = x < -88.0f ? splat(-88.0f) : (x > 87.0f ? splat(87.0f) : x);
  const vfloat magic = splat(12582912.0f);
  const vfloat rounded = fma(clamped, splat(-1.44269504f), magic);
  const vfloat f = fma(clamped, splat(-1.92596299e-08f), fma(clamped, splat(-1.44269504f), magic - rounded));
  vfloat y = splat(1.5345811821e-04f);
  y = fma(y, f, splat(1.3399931218e-03f));
  y = fma(y, f, splat(9.6184889578e-03f));
  y = fma(y, f, splat(5.5503287770e-02f));
  y = fma(y, f, splat(2.4022646891e-01f));
  y = fma(y, f, splat(6.9314720574e-01f));
  y = fma(y, f, splat(1.0f));
  const vfloat d = fma(y, power_of_two(rounded), splat(1.0f));
#if defined(__AVX512F__)
  // A division takes 16 cycles, the estimate of 14 bits and one step of Newton's method 4.
  const vfloat estimate = (vfloat)_mm512_rcp14_ps((__m512)d);
  const vfloat p = fma(estimate, fma(-d, estimate, splat(1.0f)), estimate);
#else
  const vfloat p = 1.0f / d;
#endif
  return x < -87.0f ? vfloat{} : p;
}

// base^gamma, the focal loss's weight, for base in [0, 1], given -log(base) >= 0: bounded, so that 0^0 is 1.
template <bool kSquare>
static inline vfloat focal_power(vfloat base, vfloat minus_log, float gamma) {
  return kSquare ? base * base : exp_neg(minimum(splat(1e30f), minus_log) * gamma);
}

// Reads `count` logits from element `offset` on as float32; the rest up to a multiple of 16 becomes 0.
static inline void load_logits(const void* logits, Dtype dtype, int64_t offset, int64_t count, float* out) {
  int64_t i = 0;
  if (dtype == Dtype::kFloat32) {
    memcpy(out, static_cast<const float*>(logits) + offset, count * sizeof(float));
    i = count;
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(logits) + offset;
    for (; i < count; ++i) {
      const uint32_t word = static_cast<uint32_t>(source[i]) << 16;
      memcpy(out + i, &word, sizeof word);
    }
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(logits) + offset;
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    }
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
#endif
    for (; i < count; ++i) target[i] = float_to_half(in[i]);
  } else {
    for (; i < count; ++i) target[i] = float_to_bfloat16(in[i]);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
