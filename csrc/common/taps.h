// Bilinear resampling of one axis, in one step or two, as a table of taps.
//
// Step 1 resamples `grid` logits to `padded` pixels, of which the first `valid` are kept; step 2 resamples those to
// `size`. Where two sizes of a step are equal, the step changes nothing. Coordinates are computed in double and weights
// rounded to float once; taps that two of the four reads share are one, and taps of weight 0 are left out.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmask {

// Logits are read as if they were within these bounds, NaN as the lower one (see fastmask/ops/_geometry.py).
constexpr float kLogitBound = 1e30f;

constexpr int kMaxTaps = 4;

// Vectors of outputs are read whole: tables are padded with their last output up to a multiple of this.
constexpr int64_t kTapsPadding = 64;

// out[i] = sum over t < taps of in[index[t * stride + i]] * weight[t * stride + i]; indices rise with t and with i. An
// output with fewer taps repeats its last index with weight 0.
struct Taps {
  int64_t out, stride;
  int taps;              // 1..kMaxTaps, the most that an output needs
  const int32_t* index;  // [taps, stride]
  const float* weight;   // [taps, stride]
};

// One axis of a result, or the outputs [begin, begin + count) of it.
class AxisTaps {
 public:
  AxisTaps(int64_t grid, int64_t padded, int64_t valid, int64_t size, int64_t begin, int64_t count);

  // One step from `in` to `out`.
  AxisTaps(int64_t in, int64_t out) : AxisTaps(in, in, in, out, 0, out) {}

  Taps view() const { return {count_, stride_, taps_, index_.data(), weight_.data()}; }
  // Makes indices count from input `origin` on.
  void count_from(int64_t origin);

  // The inputs [first, end) that all outputs together read.
  int32_t first() const { return first_; }
  int32_t end() const { return end_; }

 private:
  int64_t count_, stride_;
  int taps_ = 1;
  int32_t first_ = 0, end_ = 0;
  std::vector<int32_t> index_;
  std::vector<float> weight_;
};

}  // namespace fastmask
