// Reading and quantizing costs with SIMD, in two layouts: persons adjacent in memory (a cost of queries by targets,
// with no more targets than queries), or objects adjacent.
#pragma once

#include "cpu/assign_group.h"
#include "matcher/costs.h"

namespace fastmask::FASTMASK_SIMD {

constexpr int kHalf = kLanes / 2;
using vdouble = double __attribute__((vector_size(8 * kHalf)));

// kLanes float64 numbers.
struct Doubles {
  vdouble low, high;
};

static inline Doubles splat(double x) { return {vdouble{} + x, vdouble{} + x}; }

static inline Doubles load(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(double* p, Doubles v) { memcpy(p, &v, sizeof v); }

static inline Doubles widen(vfloat v) {
#if defined(__AVX512F__)
  return {(vdouble)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (vdouble)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(vdouble)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (vdouble)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#elif defined(FASTMASK_NEON)
  return {(vdouble)vcvt_f64_f32(vget_low_f32((float32x4_t)v)), (vdouble)vcvt_high_f64_f32((float32x4_t)v)};
#else
  return {vdouble{v[0], v[1]}, vdouble{v[2], v[3]}};
#endif
}

static inline Doubles widen(Doubles v) { return v; }

// Rounds toward zero; numbers beyond 32 bits, and NaN, become INT32_MIN.
static inline vint truncate(Doubles v) {
#if defined(__AVX512F__)
  return (vint)_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvttpd_epi32((__m512d)v.low)),
                                  _mm512_cvttpd_epi32((__m512d)v.high), 1);
#elif defined(__AVX2__)
  return (vint)_mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvttpd_epi32((__m256d)v.low)),
                                       _mm256_cvttpd_epi32((__m256d)v.high), 1);
#elif defined(FASTMASK_NEON)
  const auto narrowed = [](auto low, auto high) { return vuzp1q_s32((int32x4_t)low, (int32x4_t)high); };
  const auto fits = [](vdouble x) { return (x > -0x1p31) & (x < 0x1p31); };
  const int32x4_t whole = narrowed(vcvtq_s64_f64((float64x2_t)v.low), vcvtq_s64_f64((float64x2_t)v.high));
  return (vint)narrowed(fits(v.low), fits(v.high)) ? (vint)whole : splat(INT32_MIN);
#else
  const double lanes[] = {v.low[0], v.low[1], v.high[0], v.high[1]};
  vint result;
  for (int i = 0; i < kLanes; ++i) {
    result[i] = lanes[i] > -0x1p31 && lanes[i] < 0x1p31 ? static_cast<int32_t>(lanes[i]) : INT32_MIN;
  }
  return result;
#endif
}

static inline vdouble minimum(vdouble a, vdouble b) { return a < b ? a : b; }
static inline vdouble maximum(vdouble a, vdouble b) { return a > b ? a : b; }
static inline Doubles minimum(Doubles a, Doubles b) { return {minimum(a.low, b.low), minimum(a.high, b.high)}; }
static inline Doubles maximum(Doubles a, Doubles b) { return {maximum(a.low, b.low), maximum(a.high, b.high)}; }
static inline Doubles operator+(Doubles a, Doubles b) { return {a.low + b.low, a.high + b.high}; }
static inline Doubles operator-(Doubles a, Doubles b) { return {a.low - b.low, a.high - b.high}; }
static inline Doubles operator*(Doubles a, Doubles b) { return {a.low * b.low, a.high * b.high}; }

// The first `count` < kLanes numbers, followed by zeros: nothing beyond them is read.
static inline Doubles load_some(const double* p, int count) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  return {(vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p),
          (vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes >> 8), p + 8)};
#else
  Doubles v = {};
  for (int i = 0; i < kHalf && i < count; ++i) v.low[i] = p[i];
  for (int i = kHalf; i < count; ++i) v.high[i - kHalf] = p[i];
  return v;
#endif
}

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = vfloat;
};
template <>
struct VectorOf<double> {
  using Type = Doubles;
};
template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
static inline Vector<T> load_up_to(const T* p, int count) {
  return count >= kLanes ? load(p) : load_some(p, count);
}

// The least and greatest cost of each person. Returns false, and neither counts, if a cost is not finite (or their sum
// is too large).
template <class T>
static bool ranges_by_column(const matcher::Costs& c, double* least, double* greatest) {
  const T* data = static_cast<const T*>(c.data);
  Vector<T> total = {};
  for (int32_t i = 0; i < c.persons; i += kLanes) {
    const int count = c.persons - i < kLanes ? c.persons - i : kLanes;
    Vector<T> low = load_up_to(data + i, count), high = low;
    for (int32_t k = 0; k < c.objects; ++k) {
      const Vector<T> cost = load_up_to(data + k * c.object_stride + i, count);
      low = minimum(cost, low);
      high = maximum(cost, high);
      total = total + cost;
    }
    store(least + i, widen(low));
    store(greatest + i, widen(high));
  }
  const Doubles sums = widen(total - total);
  double sum = 0;
  for (int lane = 0; lane < kHalf; ++lane) sum += sums.low[lane] + sums.high[lane];
  return sum == 0;
}

template <class T>
static bool ranges_by_row(const matcher::Costs& c, double* least, double* greatest) {
  T total = 0;
  for (int32_t i = 0; i < c.persons; ++i) {
    const T* row = static_cast<const T*>(c.data) + i * c.person_stride;
    Vector<T> sums = {};
    T low = row[0], high = row[0];
    int32_t k = 0;
    if (c.objects >= kLanes) {
      Vector<T> lows = load(row), highs = lows;
      for (; k + kLanes <= c.objects; k += kLanes) {
        const Vector<T> cost = load(row + k);
        lows = minimum(cost, lows);
        highs = maximum(cost, highs);
        sums = sums + cost;
      }
      T lanes[3][kLanes];
      store(lanes[0], lows);
      store(lanes[1], highs);
      store(lanes[2], sums);
      for (int lane = 0; lane < kLanes; ++lane) {
        low = lanes[0][lane] < low ? lanes[0][lane] : low;
        high = lanes[1][lane] > high ? lanes[1][lane] : high;
        total += lanes[2][lane];
      }
    }
    for (; k < c.objects; ++k) {
      low = row[k] < low ? row[k] : low;
      high = row[k] > high ? row[k] : high;
      total += row[k];
    }
    least[i] = low;
    greatest[i] = high;
  }
  return total - total == 0;
}

// Quantized costs: 2 floor((c - u) scale), or, of the reduced costs, 2 floor(min((c + p - u) scale + 1, limit)).
struct Plain {
  double scale;

  template <class V>
  vint operator()(V cost, Doubles offset, int32_t) const {
    const vint q = truncate((widen(cost) - offset) * splat(scale));
    return wrapping_sum(q, q);
  }
};

struct Reduced {
  double scale, limit;
  const double* price;

  vint fixed(Doubles left) const {
    const vint q = truncate(minimum(maximum(left * splat(scale) + splat(1.0), Doubles{}), splat(limit)));
    return wrapping_sum(q, q);
  }

  template <class V>
  vint operator()(V cost, Doubles offset, int32_t k) const {
    const Doubles left = (widen(cost) + splat(price[k])) - offset;
    return fixed(left);
  }

  template <class V>
  vint along_row(V cost, Doubles offset, int32_t k) const {
    const Doubles left = (widen(cost) + load(price + k)) - offset;
    return fixed(left);
  }
};

template <class T, class Quantizer>
static void quantize_by_column(const matcher::Costs& c, const double* offsets, const Quantizer& quantizer,
                               int32_t* costs, int32_t stride) {
  const T* data = static_cast<const T*>(c.data);
  for (int32_t i = 0; i < c.persons; i += kLanes) {
    const int count = c.persons - i < kLanes ? c.persons - i : kLanes;
    const Doubles offset = load(offsets + i);
    for (int32_t k = 0; k < stride; k += kLanes) {
      vint rows[kLanes];
      const int height = c.objects - k < kLanes ? c.objects - k : kLanes;
      const T* block = data + k * c.object_stride + i;
      if (height == kLanes && count == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) rows[j] = quantizer(load(block + j * c.object_stride), offset, k + j);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          rows[j] = j < height ? quantizer(load_up_to(block + j * c.object_stride, count), offset, k + j)
                               : splat(matcher::kPadding);
        }
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (j < count) store(costs + static_cast<int64_t>(i + j) * stride + k, rows[j]);
      }
    }
  }
}

template <class T, class Quantizer>
static void quantize_by_row(const matcher::Costs& c, const double* offsets, const Quantizer& quantizer, int32_t* costs,
                            int32_t stride) {
  for (int32_t i = 0; i < c.persons; ++i) {
    const T* row = static_cast<const T*>(c.data) + i * c.person_stride;
    int32_t* out = costs + static_cast<int64_t>(i) * stride;
    const Doubles offset = splat(offsets[i]);
    for (int32_t k = 0; k < stride; k += kLanes) {
      const int count = c.objects - k < kLanes ? c.objects - k : kLanes;
      vint q = splat(matcher::kPadding);
      if (count > 0) {
        const Vector<T> cost = load_up_to(row + k, count);
        if constexpr (requires { quantizer.limit; }) {
          q = quantizer.along_row(cost, offset, k);
        } else {
          q = quantizer(cost, offset, k);
        }
      }
      if (count < kLanes) q = choose_less(lane_numbers(), splat(count), q, splat(matcher::kPadding));
      store(out + k, q);
    }
  }
}

// sum[i] = min over k of c[i][k] + price[k]
template <class T>
static void least_sums_by_column(const matcher::Costs& c, const double* price, double* sum) {
  const T* data = static_cast<const T*>(c.data);
  for (int32_t i = 0; i < c.persons; i += kLanes) {
    const int count = c.persons - i < kLanes ? c.persons - i : kLanes;
    Doubles least = splat(__builtin_inf());
    for (int32_t k = 0; k < c.objects; ++k) {
      least = minimum(widen(load_up_to(data + k * c.object_stride + i, count)) + splat(price[k]), least);
    }
    store(sum + i, least);
  }
}

template <class T>
static void least_sums_by_row(const matcher::Costs& c, const double* price, double* sum) {
  for (int32_t i = 0; i < c.persons; ++i) {
    const T* row = static_cast<const T*>(c.data) + i * c.person_stride;
    Doubles least = splat(__builtin_inf());
    int32_t k = 0;
    for (; k + kLanes <= c.objects; k += kLanes) least = minimum(widen(load(row + k)) + load(price + k), least);
    double lanes[kLanes];
    store(lanes, least);
    for (int lane = 1; lane < kLanes; ++lane) lanes[0] = lanes[lane] < lanes[0] ? lanes[lane] : lanes[0];
    for (; k < c.objects; ++k) lanes[0] = row[k] + price[k] < lanes[0] ? row[k] + price[k] : lanes[0];
    sum[i] = lanes[0] + 0.0;
  }
}

}  // namespace fastmask::FASTMASK_SIMD
