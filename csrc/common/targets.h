// The targets of one image in the form that kernels read: M binary masks, or one segment map, on an H x W grid.
#pragma once

#include <cstdint>

namespace fastmask {

enum class SegmentType : int { kUInt8, kInt16, kInt32 };

struct ImageTargets {
  int64_t height, width;  // H, W
  int64_t count;          // targets of this image; the others are padding
  const uint8_t* masks;   // [M, H, W], or null
  const void* segments;   // [H, W] of segment_type, or null
  SegmentType segment_type;
  const uint8_t* valid;  // [H, W], 0 where void, or null; read only if ignore_void
  int64_t void_value;    // of `segments`
  bool ignore_void;
};

// Calls run(segments) with a pointer of the segments' type.
template <class Run>
static inline auto with_segments(const ImageTargets& targets, const Run& run) {
  switch (targets.segment_type) {
    case SegmentType::kUInt8:
      return run(static_cast<const uint8_t*>(targets.segments));
    case SegmentType::kInt16:
      return run(static_cast<const int16_t*>(targets.segments));
    default:
      return run(static_cast<const int32_t*>(targets.segments));
  }
}

[[maybe_unused]] static inline int64_t segment_at(const ImageTargets& targets, int64_t pixel) {
  return with_segments(targets, [pixel](const auto* segments) { return static_cast<int64_t>(segments[pixel]); });
}

// False if the pixel is void and void pixels are to be left out.
[[maybe_unused]] static inline bool counts_pixel(const ImageTargets& targets, int64_t pixel) {
  if (!targets.ignore_void) return true;
  if (targets.segments != nullptr) return segment_at(targets, pixel) != targets.void_value;
  return targets.valid == nullptr || targets.valid[pixel] != 0;
}

}  // namespace fastmask
