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
#if defined(__AVX512F__)
  // 2^n 2^f with n in sixteenths, whose fractions a table has, so that |f| <= 1/32: a polynomial of degree 3 (relative
  // error 2e-9 before rounding).
  const vfloat magic = splat(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths
#else
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
#endif
  const vfloat rounded = fma(a, splat(-1.44269504f), magic);
  const vfloat n = rounded - magic;
  const vfloat f = fma(a, splat(-1.92596299e-08f), fma(a, splat(-1.44269504f), -n));
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                      1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                      1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const vfloat fraction = (vfloat)_mm512_permutexvar_ps((__m512i)bits(rounded), table);
  const vfloat small = polynomial(f, splat(5.5502481759e-02f), 2.4023589492e-01f, 6.9314718246e-01f, 1.0f);
  return (vfloat)_mm512_scalef_ps((__m512)(small * fraction), (__m512)n);  // 2^floor(n)
#else
  return exp2_fraction(f) * power_of_two(rounded);
#endif
}

// 1 / d for d >= 1.
static inline vfloat reciprocal(vfloat d) {
#if defined(__AVX512F__)
  // A division takes 16 cycles; an estimate with 14 bits and one step of Newton's method take 4.
  const vfloat estimate = (vfloat)_mm512_rcp14_ps((__m512)d);
  return fma(estimate, fma(-d, estimate, splat(1.0f)), estimate);
#else
  return 1.0f / d;
#endif
}

// The functions of a logit x that mask terms need, from one exponential and one division.
struct Sigmoid {
  vfloat p;             // sigmoid(x)
  vfloat q;             // 1 - p = sigmoid(-x)
  vfloat softplus_pos;  // softplus(x) = log(1 + exp(x)) = -log(q)
  vfloat softplus_neg;  // softplus(-x) = -log(p)
};

// With e = exp(-|x|): sigmoid(|x|) = 1 / (1 + e), and log(1 + e) = e times a polynomial of degree 9 (relative error
// 6e-9 before rounding, also where e is tiny), which does not wait for the division.
static inline Sigmoid sigmoid(vfloat x) {
  const vint negative = bits(x) < 0;
  const vfloat e = exp_neg(from_bits(bits(x) & INT32_MAX));
  const vfloat large = reciprocal(e + 1.0f);  // sigmoid(|x|)
  const vfloat small = e * large;             // sigmoid(-|x|)
  const vfloat log1p_e = e * polynomial(e, splat(-3.1639994122e-03f), 1.9487686455e-02f, -5.6269526482e-02f,
                                        1.0532950610e-01f, -1.5263274312e-01f, 1.9661018252e-01f, -2.4951167405e-01f,
                                        3.3329665661e-01f, -4.9999889731e-01f, 1.0f);
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
  return FASTMASK_CHOOSE(x < -87.0f, vfloat{}, reciprocal(d));
}

}  // namespace fastmask::FASTMASK_SIMD
