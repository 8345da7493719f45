#include "cpu/count_nan.h"

#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {

int64_t count_nan(const Plane& plane, int64_t rows, int64_t width) {
  constexpr int64_t kPiece = 256;
  float buffer[kPiece];
  int64_t total = 0;
  for (int64_t y = 0; y < rows; ++y) {
    vint count = {};
    for (int64_t x = 0; x < width; x += kPiece) {
      const int64_t piece = width - x < kPiece ? width - x : kPiece;
      load_logits(plane.logits, plane.dtype, plane.offset + y * plane.row_stride + x, piece, buffer);
      for (int64_t j = 0; j < piece; j += kLanes) {
        const vfloat v = load(buffer + j);
        count -= v != v;
      }
    }
    for (int i = 0; i < kLanes; ++i) total += count[i];
  }
  return total;
}

}  // namespace fastmask::FASTMASK_SIMD
