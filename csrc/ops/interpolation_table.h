// The tables of csrc/common/interpolation.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/interpolation.h"
#include "ops/tensors.h"

namespace fastmask {

// PyTorch's bilinear rule with align_corners=False: source = (i + 0.5) * in / out - 0.5, at least 0. It is kept as an
// integer, in units of 1 / (2 out), so that weights are 0 where they ought to be. A pixel without weight is not read,
// as 0 * inf is NaN: where one pixel is the whole result, it is both taps, and each has half of it.
struct InterpolationTable {
  std::vector<int32_t> first, second;
  std::vector<float> weight;

  InterpolationTable() = default;

  InterpolationTable(int64_t in, int64_t out) {
    STD_TORCH_CHECK(in < INT32_MAX && out < INT32_MAX, "maps must have sides of less than 2^31");
    first.resize(out);
    second.resize(out);
    weight.resize(out);
    for (int64_t i = 0; i < out; ++i) {
      const int64_t source = std::max<int64_t>((2 * i + 1) * in - out, 0);
      const int64_t from = std::min(source / (2 * out), in - 1), rest = source - from * 2 * out;
      const bool whole = rest == 0 || from == in - 1;
      first[i] = static_cast<int32_t>(from);
      second[i] = static_cast<int32_t>(whole ? from : from + 1);
      weight[i] = whole ? 0.5f : static_cast<float>(static_cast<double>(rest) / static_cast<double>(2 * out));
    }
  }

  Interpolation view() const { return {first.data(), second.data(), weight.data()}; }
};

}  // namespace fastmask
