// Lays out several arrays in one block of memory.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTMASK_HOST_DEVICE __host__ __device__
#else
#define FASTMASK_HOST_DEVICE
#endif

namespace fastmask {

FASTMASK_HOST_DEVICE static constexpr int64_t ceil_div(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

FASTMASK_HOST_DEVICE static constexpr int64_t round_up(int64_t count, int64_t size) {
  return ceil_div(count, size) * size;
}

constexpr int64_t kMostLanes = 16;  // the most lanes of a vector at any SIMD level

// Rounds up to full vectors of every SIMD level.
FASTMASK_HOST_DEVICE static constexpr int64_t to_full_vectors(int64_t count) { return round_up(count, kMostLanes); }

// Each array begins at a 64-byte boundary, as the memory must. Given a null pointer, the carver only counts bytes.
class Carver {
 public:
  FASTMASK_HOST_DEVICE explicit Carver(char* memory) : memory_(memory) {}

  template <class T>
  FASTMASK_HOST_DEVICE void take(T*& array, int64_t count) {
    array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

  FASTMASK_HOST_DEVICE int64_t used() const { return used_; }  // bytes

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace fastmask
