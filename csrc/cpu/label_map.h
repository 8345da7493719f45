// Labels written in the type of the map.
#pragma once

#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

template <class T>
inline void convert_labels(const int32_t* labels, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(labels[i]);
}

// `count` labels from pixel `at` on.
inline void write_labels(const SemanticMaps& maps, int64_t at, const int32_t* labels, int64_t count) {
  switch (maps.label_bytes) {
    case 1:
      convert_labels(labels, count, static_cast<uint8_t*>(maps.labels) + at);
      break;
    case 2:
      convert_labels(labels, count, static_cast<int16_t*>(maps.labels) + at);
      break;
    default:
      convert_labels(labels, count, static_cast<int32_t*>(maps.labels) + at);
  }
}

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
