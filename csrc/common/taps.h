// The inputs that each output of a resampled axis reads, and their weights.
#pragma once

#include <cstdint>
#include <vector>

#include "common/carver.h"

namespace fastmask {

// Logits are clamped to -kLogitBound..kLogitBound, and NaN becomes -kLogitBound (see fastmask/ops/_geometry.py).
constexpr float kLogitBound = 1e30f;

constexpr int kMaxTaps = 4;

// Kernels read whole vectors of outputs, so tables are padded with their last output to a multiple of this.
constexpr int64_t kTapsPadding = 64;

// out[i] = sum over t < taps of in[index[t * stride + i]] * weight[t * stride + i]; indices increase with t and i. An
// output with fewer taps repeats its last index.
struct Taps {
  int64_t out, stride;
  int taps;              // 1..kMaxTaps, the most that an output needs
  const int32_t* index;  // [taps, stride]
  const float* weight;   // [taps, stride]
};

// How the columns of a stretched row lie in memory. If the ratio of the widths is whole, they come phase by phase:
// output ratio * c + k, of phase k, lies at [k * stride + c] and is in[c + first[k]] * first_weight[k] + in[c +
// second[k]] * second_weight[k], with the border pixels repeated beyond the row. Neighboring columns then read
// neighboring inputs. Otherwise there is one phase, with the columns in their order.
struct Phases {
  static constexpr int kMaxRatio = 16;

  Phases() = default;
  Phases(int64_t in, int64_t out);

  int ratio = 0;              // 0: not whole, or more than kMaxRatio
  int64_t count = 0;          // of phases
  int64_t columns = 0;        // of one phase
  int64_t stride = 0;         // whole vectors, and kMostLanes of room, as vectors may begin or end there
  int64_t size = 0;           // count * stride
  int first[kMaxRatio] = {};  // -1, 0 or 1
  int second[kMaxRatio] = {};
  float first_weight[kMaxRatio] = {}, second_weight[kMaxRatio] = {};
};

// Both axes of a map.
struct Resampling {
  Taps rows, columns;
  Phases phases;  // of the columns
};

// Bilinear taps of one axis by PyTorch's rule with align_corners=False.
class TapTable {
 public:
  TapTable() = default;

  // One step, always two taps: source = (i + 0.5) * in / out - 0.5, at least 0. It is computed as an integer, in units
  // of 1 / (2 out), so that zero weights are exactly 0. A pixel of weight 0 is not read, as 0 * inf is NaN: if one
  // pixel is the whole output, it serves as both taps, with half the weight each.
  TapTable(int64_t in, int64_t out);

  // Two steps in one, for the outputs [begin, begin + count): step 1 resamples `grid` logits to `padded` pixels, of
  // which the first `valid` are kept; step 2 resamples those to `size`. A step between equal sizes changes nothing.
  // Coordinates are computed in double, and weights are rounded to float once; equal inputs among the four reads share
  // a tap, and taps of weight 0 are left out.
  TapTable(int64_t grid, int64_t padded, int64_t valid, int64_t size, int64_t begin, int64_t count);

  Taps view() const { return {count_, stride_, taps_, index_.data(), weight_.data()}; }

  // Makes indices relative to input `origin`.
  void count_from(int64_t origin);

  // The range [first, end) of inputs that all outputs read together.
  int32_t first() const { return index_.front(); }
  int32_t end() const { return index_.back() + 1; }

 private:
  TapTable(int64_t count, int taps);
  void set(int64_t i, int tap, int64_t index, float weight);

  int64_t count_ = 0, stride_ = 0;
  int taps_ = 0;
  std::vector<int32_t> index_;
  std::vector<float> weight_;
};

// PyTorch's "nearest" rule, in float like PyTorch: floor(i * in / out).
std::vector<int64_t> nearest_taps(int64_t in, int64_t out);

}  // namespace fastmask
