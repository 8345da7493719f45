// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter per lane.
#pragma once

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

// Both halves of the 64-bit products a * b.
static inline void multiply(vuint a, uint32_t b, vuint& high, vuint& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi64(b);
  // Masked forms, because gcc 12 warns about undefined lanes in the others.
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), factor);
  high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
  low = (vuint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(FASTMASK_NEON)
  const uint32x4_t front = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32((uint32x4_t)a), b));
  const uint32x4_t back = vreinterpretq_u32_u64(vmull_high_n_u32((uint32x4_t)a, b));
  high = (vuint)vuzp2q_u32(front, back);
  low = (vuint)vuzp1q_u32(front, back);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

struct Words {
  vuint word[4];
};

// Four words for each of the counters (c0, c1, 0, 0).
static inline Words philox(uint64_t seed, vuint c0, vuint c1) {
  Words x{{c0, c1, vuint{}, vuint{}}};
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vuint high_0, low_0, high_1, low_1;
    multiply(x.word[0], 0xD2511F53u, high_0, low_0);
    multiply(x.word[2], 0xCD9E8D57u, high_1, low_1);
    x = {{high_1 ^ x.word[1] ^ key_0, low_1, high_0 ^ x.word[3] ^ key_1, low_0}};
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return x;
}

// Uniform in [0, 1): the upper 24 bits of each word.
static inline vfloat uniform(vuint word) {
  return __builtin_convertvector((vint)(word >> 8), vfloat) * splat(0x1p-24f);
}

// All ones in the lanes i whose number u(index + steps[i]) in [0, 1) is at least `probability`, for steps of at least
// 0. u is the first word for its counter, converted to float as in Triton's tl.rand, so that both drop the same
// weights.
static inline vint keep_lanes(uint64_t seed, uint64_t index, vint steps, float probability) {
  const uint32_t low = static_cast<uint32_t>(index);
  const vuint c0 = (vuint)steps + low;
  const vuint carry = (vuint)(c0 < low);
  const vint word = (vint)philox(seed, c0, (vuint{} + static_cast<uint32_t>(index >> 32)) - carry).word[0];
  const vfloat u = __builtin_convertvector(word < 0 ? ~word : word, vfloat) * 4.6566127342e-10f;
  return u >= probability;
}

}  // namespace fastmask::FASTMASK_SIMD
