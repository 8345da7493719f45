// Moves chosen lanes of vectors to the front.
#pragma once

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

#if !defined(__AVX512F__)
// For each set of lanes the numbers of its lanes, in order, in the lowest bytes.
struct LaneOrders {
  uint64_t bytes[1 << kLanes] = {};

  constexpr LaneOrders() {
    for (uint32_t lanes = 0; lanes <= kAllLanes; ++lanes) {
      int count = 0;
      for (uint64_t lane = 0; lane < kLanes; ++lane) {
        if ((lanes >> lane & 1) != 0) bytes[lanes] |= lane << (8 * count++);
      }
    }
  }
};

static constexpr LaneOrders kLaneOrders;
#endif

class Packing {
 public:
  // Chooses the lanes whose bits are set.
  explicit Packing(uint32_t lanes) : lanes_(lanes) {
#if defined(__AVX512F__)
#elif defined(__AVX2__)
    order_ = (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneOrders.bytes + lanes)));
#elif defined(FASTMASK_NEON)
    const uint8x8_t numbers = vcreate_u8(kLaneOrders.bytes[lanes]);
    const uint32x4_t lane = vmovl_u16(vget_low_u16(vmovl_u8(numbers)));
    order_ = (vint)(lane * 0x04040404u + 0x03020100u);  // of bytes
#else
    order_ = load_bytes(reinterpret_cast<const int8_t*>(kLaneOrders.bytes + lanes));
#endif
  }

  int64_t count() const { return __builtin_popcount(lanes_); }

  // The chosen lanes in order; the rest of the result may be anything.
  vfloat operator()(vfloat v) const {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_compress_ps(static_cast<__mmask16>(lanes_), (__m512)v);
#elif defined(__AVX2__)
    return (vfloat)_mm256_permutevar8x32_ps((__m256)v, (__m256i)order_);
#elif defined(FASTMASK_NEON)
    return (vfloat)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)order_);
#else
    return by_lane<vfloat>([&](int i) { return v[order_[i]]; });
#endif
  }

  vint operator()(vint v) const { return bits((*this)(from_bits(v))); }

 private:
  uint32_t lanes_;
#if !defined(__AVX512F__)
  vint order_;
#endif
};

}  // namespace fastmask::FASTMASK_SIMD
