#include "cpu/count_nan.h"

#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

int64_t count_nan(const Plane& plane) {
  constexpr int64_t kPiece = 256;
  float buffer[kPiece];
  int64_t total = 0;
  for (int64_t y = 0; y < plane.h; ++y) {
    vint count = {};
    for (int64_t x = 0; x < plane.w; x += kPiece) {
      const int64_t piece = plane.w - x < kPiece ? plane.w - x : kPiece;
      load_logits(after(row_of(plane, y), x), piece, buffer);
      for (int64_t j = 0; j < piece; j += kLanes) {
        const vfloat v = load(buffer + j);
        count -= v != v;
      }
    }
    total += sum_lanes<int64_t>(count);
  }
  return total;
}

}  // namespace fastmask::FASTMASK_SIMD
