// Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter per lane.
#pragma once

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

// Of half as many lanes, of which only the lower 32 bits count in what follows.
using vwide = uint64_t __attribute__((vector_size(4 * kLanes)));

// Products of 64 bits with the lower halves of a.
static inline vwide multiply(vwide a, uint32_t b) {
#if defined(__AVX512F__)
  return (vwide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));  // masked: else gcc 12 warns
#elif defined(__AVX2__)
  return (vwide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(FASTMASK_NEON)
  return (vwide)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
  return (a & 0xffffffff) * b;
#endif
}

struct Words {
  vuint word[4];
};

struct WideWords {
  vwide word[4];
};

// Four words for each of the counters (c0, c1, 0, 0).
template <int kRounds>
static inline WideWords philox(uint64_t seed, vwide c0, vwide c1) {
  WideWords x{{c0, c1, vwide{}, vwide{}}};
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const vwide a = multiply(x.word[0], 0xD2511F53u), b = multiply(x.word[2], 0xCD9E8D57u);
    x = {{(b >> 32) ^ x.word[1] ^ key_0, b, (a >> 32) ^ x.word[3] ^ key_1, a}};
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return x;
}

template <int kRounds>
static inline Words philox(uint64_t seed, vuint c0, vuint c1) {
  const WideWords even = philox<kRounds>(seed, (vwide)c0, (vwide)c1);
  const WideWords odd = philox<kRounds>(seed, (vwide)c0 >> 32, (vwide)c1 >> 32);
  Words x;
  for (int i = 0; i < 4; ++i) x.word[i] = (vuint)((even.word[i] & 0xffffffff) | odd.word[i] << 32);
  return x;
}

// All ones in the lanes i whose number u(index + steps[i]) in [0, 1) is at least `probability`, for steps of at least
// 0. u is the first word for its counter (of 10 rounds), converted to float as in Triton's tl.rand, so that both drop
// the same weights.
static inline vint keep_lanes(uint64_t seed, uint64_t index, vint steps, float probability) {
  const uint32_t low = static_cast<uint32_t>(index);
  const vuint c0 = (vuint)steps + low;
  const vuint carry = (vuint)(c0 < low);
  const vint word = (vint)philox<10>(seed, c0, (vuint{} + static_cast<uint32_t>(index >> 32)) - carry).word[0];
  const vfloat u = __builtin_convertvector(word < 0 ? ~word : word, vfloat) * 4.6566127342e-10f;
  return u >= probability;
}

}  // namespace fastmask::FASTMASK_SIMD
