// The special functions that the kernels need.
#pragma once

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

// 2^n, given n + 1.5 * 2^23, for n in -126..127.
static inline vfloat power_of_two(vfloat rounded) {
  return from_bits((vint)(((vuint)bits(rounded) << 23) + (vuint)splat(int32_t{127 << 23})));
}

// Horner's rule; the coefficients of the highest powers come first.
static inline vfloat polynomial(vfloat, vfloat y) { return y; }
template <class... Rest>
static inline vfloat polynomial(vfloat x, vfloat y, float coefficient, Rest... rest) {
  return polynomial(x, fma(y, x, splat(coefficient)), rest...);
}

// 2^f for f in [-1/2, 1/2]: a minimax polynomial of degree 6 (relative error 2e-9 before rounding).
static inline vfloat exp2_fraction(vfloat f) {
  return polynomial(f, splat(1.5345811821e-04f), 1.3399931218e-03f, 9.6184889578e-03f, 5.5503287770e-02f,
                    2.4022646891e-01f, 6.9314720574e-01f, 1.0f);
}

// exp(-a) for a >= 0. The result is at least 2^-126; NaN gives NaN.
static inline vfloat exp_neg(vfloat a) {
  a = at_most(a, 87.3f);
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat rounded = fma(a, splat(-1.44269504f), magic);
  const vfloat n = rounded - magic;
  const vfloat f = fma(a, splat(-1.92596299e-08f), fma(a, splat(-1.44269504f), -n));
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)exp2_fraction(f), (__m512)n);
#else
  return exp2_fraction(f) * power_of_two(rounded);
#endif
}

// The functions of a logit x that mask terms need, from one exponential and one division.
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
  const vint negative = bits(x) < 0;
  const vfloat e = exp_neg(from_bits(bits(x) & INT32_MAX));
  const vfloat one_e = e + 1.0f;
  const vfloat two_e = e + 2.0f;
  const vfloat r = 1.0f / (one_e * two_e);
  const vfloat large = two_e * r;  // sigmoid(|x|)
  const vfloat small = e * large;  // sigmoid(-|x|)
  const vfloat s = e * (one_e * r);
  const vfloat u = s * s;
  const vfloat log1p_e =
      polynomial(u, splat(2.8178334886e-01f), 2.7960602759e-01f, 4.0024910282e-01f, 6.6666314682e-01f, 2.0f) * s;
  return {negative ? small : large, negative ? large : small, log1p_e + at_least(x, 0.0f), log1p_e - at_most(x, 0.0f)};
}

// Only sigmoid(x), for x other than NaN: 1 / (1 + 2^n y) with 2^n y = exp(-x) as in exp_neg. 0 below -87.
static inline vfloat logistic(vfloat x) {
#if defined(FASTMASK_NEON)
  const vfloat clamped = at_least(at_most(x, 87.0f), -88.0f);
#else
  const vfloat clamped = x < -88.0f ? splat(-88.0f) : (x > 87.0f ? splat(87.0f) : x);
#endif
  const vfloat magic = splat(12582912.0f);
  const vfloat rounded = fma(clamped, splat(-1.44269504f), magic);
  const vfloat f = fma(clamped, splat(-1.92596299e-08f), fma(clamped, splat(-1.44269504f), magic - rounded));
  const vfloat d = fma(exp2_fraction(f), power_of_two(rounded), splat(1.0f));
#if defined(__AVX512F__)
  // A division takes 16 cycles; an estimate with 14 bits and one step of Newton's method take 4.
  const vfloat estimate = (vfloat)_mm512_rcp14_ps((__m512)d);
  const vfloat p = fma(estimate, fma(-d, estimate, splat(1.0f)), estimate);
#else
  const vfloat p = 1.0f / d;
#endif
  return FASTMASK_CHOOSE(x < -87.0f, vfloat{}, p);
}

}  // namespace fastmask::FASTMASK_SIMD
