// Vectors of the SIMD level for which this file is compiled.
//
// Only functions of this level's namespace may be defined here: the linker would merge an inline function that levels
// share into one copy, compiled for whichever level came first.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(FASTMASK_NEON)
#include <arm_neon.h>
#endif

#if defined(__clang__)
// Passing vectors as arguments is safe, as no function of one level is called from another.
#pragma GCC diagnostic ignored "-Wpsabi"
#else
// GCC warns about its own intrinsics, such as _mm512_min_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Selects the expression for the SIMD level. The portable one also serves NEON, unless a fourth is given.
#if defined(__AVX512F__)
#define FASTMASK_BY_LEVEL(avx512, avx2, portable, ...) (avx512)
#elif defined(__AVX2__)
#define FASTMASK_BY_LEVEL(avx512, avx2, portable, ...) (avx2)
#elif defined(FASTMASK_NEON)
#define FASTMASK_FIRST(expression, ...) (expression)
#define FASTMASK_BY_LEVEL(avx512, avx2, portable, ...) FASTMASK_FIRST(__VA_ARGS__ __VA_OPT__(, ) portable)
#else
#define FASTMASK_BY_LEVEL(avx512, avx2, portable, ...) (portable)
#endif

namespace fastmask::FASTMASK_SIMD {

constexpr int kLanes = FASTMASK_BY_LEVEL(16, 8, 4);
constexpr int kRegisters = FASTMASK_BY_LEVEL(32, 16, 16, 32);

using vfloat = float __attribute__((vector_size(4 * kLanes)));
using vint = int32_t __attribute__((vector_size(4 * kLanes)));
using vuint = uint32_t __attribute__((vector_size(4 * kLanes)));
using vbyte = int8_t __attribute__((vector_size(kLanes)));
using vdouble = double __attribute__((vector_size(4 * kLanes)));  // of half as many lanes

// Subtracting 0 changes no x, not even -0, so the compiler emits a plain broadcast.
static inline vfloat splat(float x) { return x - vfloat{}; }
static inline vint splat(int32_t x) { return vint{} + x; }

// f(i) in lane i.
template <class V = vint, class F>
static inline V by_lane(F f) {
  V v;
  for (int i = 0; i < kLanes; ++i) v[i] = f(i);
  return v;
}

static inline vint lane_numbers() {
  return by_lane([](int i) { return i; });
}

template <class V>
static inline V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline vfloat load(const float* p) { return load_as<vfloat>(p); }
static inline vint load(const int32_t* p) { return load_as<vint>(p); }
static inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
static inline void store(int32_t* p, vint v) { memcpy(p, &v, sizeof v); }

// kLanes bytes, each widened to 32 bits with its sign. GCC makes dozens of instructions of __builtin_convertvector
// here.
static inline vint load_bytes(const int8_t* p) {
  return FASTMASK_BY_LEVEL(
      (vint)_mm512_cvtepi8_epi32(load_as<__m128i>(p)),
      (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
      __builtin_convertvector(load_as<vbyte>(p), vint),
      (vint)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(load_as<int32_t>(p)))))));
}

static inline vint bits(vfloat v) { return load_as<vint>(&v); }
static inline vfloat from_bits(vint v) { return load_as<vfloat>(&v); }

// The first `count` < kLanes elements, followed by zeros: nothing beyond them is read.
static inline vfloat load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__AVX2__)
  return (vfloat)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < static_cast<int32_t>(count)));
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

// Lane i of the result is lane kLane[i] of a followed by b. GCC has Clang's builtin since version 12.
template <int... kLane, class V>
static inline V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, vint{kLane...});
#endif
}

// One step of a transposition: swaps the off-diagonal blocks of each 2 kStep x 2 kStep square.
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

// a * b + c, rounded once if the level has such an instruction.
static inline vfloat fma(vfloat a, vfloat b, vfloat c) {
  return FASTMASK_BY_LEVEL((vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c),
                           (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c), a * b + c,
                           (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b));
}

// a in the lanes where a comparison holds, else b. For NEON, GCC turns `?:` around, and it makes six instructions of a
// negated comparison, which holds for NaN; for x86, functions such as this hide from GCC what it can simplify.
#if defined(FASTMASK_NEON)
template <class V>
static inline V choose(vint comparison, V a, V b) {
  return (V)vbslq_u32((uint32x4_t)comparison, (uint32x4_t)a, (uint32x4_t)b);
}
#define FASTMASK_CHOOSE(comparison, a, b) choose(comparison, a, b)
#else
#define FASTMASK_CHOOSE(comparison, a, b) ((comparison) ? (a) : (b))
#endif

// Like the instruction of x86: b if either is NaN.
static inline vfloat minimum(vfloat a, vfloat b) {
  return FASTMASK_BY_LEVEL((vfloat)_mm512_min_ps((__m512)a, (__m512)b), (vfloat)_mm256_min_ps((__m256)a, (__m256)b),
                           FASTMASK_CHOOSE(a < b, a, b));
}

static inline vfloat maximum(vfloat a, vfloat b) {
  return FASTMASK_BY_LEVEL((vfloat)_mm512_max_ps((__m512)a, (__m512)b), (vfloat)_mm256_max_ps((__m256)a, (__m256)b),
                           FASTMASK_CHOOSE(a > b, a, b));
}

// The same where neither is NaN, in one instruction of NEON.
static inline vfloat minimum_of_numbers(vfloat a, vfloat b) {
#if defined(FASTMASK_NEON)
  return (vfloat)vminnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return minimum(a, b);
#endif
}

static inline vfloat maximum_of_numbers(vfloat a, vfloat b) {
#if defined(FASTMASK_NEON)
  return (vfloat)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return maximum(a, b);
#endif
}

// x, but at most or at least a bound; NaN stays NaN.
static inline vfloat at_most(vfloat x, float bound) {
#if defined(FASTMASK_NEON)
  return (vfloat)vminq_f32((float32x4_t)x, vdupq_n_f32(bound));
#else
  return minimum(splat(bound), x);
#endif
}

static inline vfloat at_least(vfloat x, float bound) {
#if defined(FASTMASK_NEON)
  return (vfloat)vmaxq_f32((float32x4_t)x, vdupq_n_f32(bound));
#else
  return maximum(splat(bound), x);
#endif
}

// The largest integer up to x, which must be in the range of integers.
static inline vint floor_to_int(vfloat x) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvt_roundps_epi32((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vint)_mm256_cvttps_epi32(_mm256_floor_ps((__m256)x));
#elif defined(FASTMASK_NEON)
  return (vint)vcvtmq_s32_f32((float32x4_t)x);
#else
  const vint truncated = __builtin_convertvector(x, vint);
  return truncated + (x < __builtin_convertvector(truncated, vfloat));
#endif
}

static inline vint minimum(vint a, vint b) {
  return FASTMASK_BY_LEVEL((vint)_mm512_min_epi32((__m512i)a, (__m512i)b),
                           (vint)_mm256_min_epi32((__m256i)a, (__m256i)b), a < b ? a : b,
                           (vint)vminq_s32((int32x4_t)a, (int32x4_t)b));
}

static inline vint maximum(vint a, vint b) {
  return FASTMASK_BY_LEVEL((vint)_mm512_max_epi32((__m512i)a, (__m512i)b),
                           (vint)_mm256_max_epi32((__m256i)a, (__m256i)b), a > b ? a : b,
                           (vint)vmaxq_s32((int32x4_t)a, (int32x4_t)b));
}

static inline vint minimum_unsigned(vint a, vint b) {
  return FASTMASK_BY_LEVEL((vint)_mm512_min_epu32((__m512i)a, (__m512i)b),
                           (vint)_mm256_min_epu32((__m256i)a, (__m256i)b), (vuint)a < (vuint)b ? a : b,
                           (vint)vminq_u32((uint32x4_t)a, (uint32x4_t)b));
}

// a + b modulo 2^32. Signed sums must not overflow, not even in a lane whose result is not used.
static inline vint wrapping_sum(vint a, vint b) { return (vint)((vuint)a + (vuint)b); }

// p[index] of each lane.
static inline vfloat gather(const float* p, vint index) {
  return FASTMASK_BY_LEVEL((vfloat)_mm512_i32gather_ps((__m512i)index, p, 4),
                           (vfloat)_mm256_i32gather_ps(p, (__m256i)index, 4),
                           by_lane<vfloat>([&](int i) { return p[index[i]]; }));
}

// `value` with the bits of `mask` replaced by `tag`, which has no other bits.
static inline vfloat with_tag(vfloat value, vint tag, vint mask) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_ternarylogic_epi32((__m512i)value, (__m512i)tag, (__m512i)mask, 0xDC);
#elif defined(FASTMASK_NEON)
  return (vfloat)vbslq_s32((uint32x4_t)mask, (int32x4_t)tag, (int32x4_t)value);
#else
  return from_bits((bits(value) & ~mask) | tag);
#endif
}

constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes) - 1;

// Bit i is set where holds(i).
template <class F>
static inline uint32_t bits_where(F holds) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(holds(i)) << i;
  return mask;
}

// Bit i is set where lane i of a comparison holds.
static inline uint32_t lane_bits(vint comparison) {
  return FASTMASK_BY_LEVEL(_mm512_movepi32_mask((__m512i)comparison),
                           static_cast<uint32_t>(_mm256_movemask_ps((__m256)comparison)),
                           bits_where([&](int i) { return comparison[i] < 0; }),
                           vaddvq_u32((uint32x4_t)comparison & uint32x4_t{1, 2, 4, 8}));
}

// The sum over the lanes, in a fixed order.
template <class Sum = double, class V>
static inline Sum sum_lanes(V v) {
  Sum total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

static inline double sum_lanes(vdouble v) {
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += v[i];
  return total;
}

// The sum of both halves of the lanes.
static inline vdouble in_double(vfloat v) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
  return (vdouble)low + (vdouble)high;
#elif defined(__AVX2__)
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  return (vdouble)low + (vdouble)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(FASTMASK_NEON)
  return (vdouble)vcvt_f64_f32(vget_low_f32((float32x4_t)v)) + (vdouble)vcvt_high_f64_f32((float32x4_t)v);
#else
  return vdouble{v[0], v[1]} + vdouble{v[2], v[3]};
#endif
}

// f(f(v[0], v[1]), ...) for an f whose result depends on no order, such as the minimum.
template <int kStep = kLanes / 2, class V, class F>
static inline auto combine_lanes(V v, F f) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return combine_lanes<kStep / 2>(f(v, shuffle<((kLane + kStep) % kLanes)...>(v, v)), f);
    }(std::make_integer_sequence<int, kLanes>{});
  }
}

// All ones in the lanes whose bits are set in `lanes`, for vector number `part` of a chunk.
static inline vint select(uint32_t lanes, int part) {
  const vint lane_bit = by_lane([](int i) { return 1 << i; });
  return (splat(static_cast<int32_t>(lanes >> (part * kLanes))) & lane_bit) != 0;
}

static inline vfloat masked(vint mask, vfloat v) { return mask ? v : vfloat{}; }

// sum + v in the lanes whose bits are set in `lanes`, for vector number `part` of a chunk.
static inline vfloat add_selected(vfloat sum, uint32_t lanes, int part, vfloat v) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(lanes >> (part * kLanes));
  return (vfloat)_mm512_mask_add_ps((__m512)sum, mask, (__m512)sum, (__m512)v);
#else
  return sum + masked(select(lanes, part), v);
#endif
}

}  // namespace fastmask::FASTMASK_SIMD
