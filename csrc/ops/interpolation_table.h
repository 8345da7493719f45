// The tables of csrc/interpolation.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "interpolation.h"

namespace fastmask {

// PyTorch's bilinear rule with align_corners=False, in float like PyTorch: source = (i + 0.5) * in / out - 0.5, at
// least 0.
struct InterpolationTable {
  std::vector<int32_t> first, second;
  std::vector<float> weight;

  InterpolationTable(int64_t in, int64_t out) : first(out), second(out), weight(out) {
    const float scale = static_cast<float>(in) / static_cast<float>(out);
    for (int64_t i = 0; i < out; ++i) {
      const float source = std::max((static_cast<float>(i) + 0.5f) * scale - 0.5f, 0.0f);
      first[i] = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(source), in - 1));
      second[i] = static_cast<int32_t>(std::min<int64_t>(first[i] + 1, in - 1));
      weight[i] = std::clamp(source - static_cast<float>(first[i]), 0.0f, 1.0f);
    }
  }

  Interpolation view() const { return {first.data(), second.data(), weight.data()}; }
};

}  // namespace fastmask
