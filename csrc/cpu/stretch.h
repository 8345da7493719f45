// Stretches rows of a map to the width of the targets, and contracts their gradients: the transpose. See Phases for
// the order of the columns.
#pragma once

#include <cstdint>

#include "common/taps.h"
#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

class Stretch {
 public:
  Stretch(const Resampling& resampling, int64_t w) : w_(w), taps_(resampling.columns), phases_(resampling.phases) {}

  // `row` has w logits, and room for one before and for kMostLanes + 1 behind them.
  void stretch(float* row, float* out) const {
    if (phases_.ratio == 0) {
      const int32_t *first = taps_.index, *second = first + taps_.stride;
      const float *first_weight = taps_.weight, *second_weight = first_weight + taps_.stride;
      for (int64_t j = 0; j < taps_.out; ++j) {
        out[j] = row[first[j]] * first_weight[j] + row[second[j]] * second_weight[j];
      }
      return;
    }
    row[-1] = row[0];
    row[w_] = row[w_ - 1];
    for (int k = 0; k < phases_.ratio; ++k) {
      const float *first = row + phases_.first[k], *second = row + phases_.second[k];
      const vfloat first_weight = splat(phases_.first_weight[k]), second_weight = splat(phases_.second_weight[k]);
      for (int64_t c = 0; c < w_; c += kLanes) {
        store(out + k * phases_.stride + c, fma(load(second + c), second_weight, load(first + c) * first_weight));
      }
    }
  }

  // grad[0..w) becomes the sums of the stretched gradients by the columns' weights; up to a full vector of `grad` is
  // written. `stretched` has kMostLanes zeros before it.
  void contract(const float* stretched, float* grad) const {
    if (phases_.ratio == 0) {
      const int32_t *first = taps_.index, *second = first + taps_.stride;
      const float *first_weight = taps_.weight, *second_weight = first_weight + taps_.stride;
      for (int64_t j = 0; j < taps_.out;) {
        // Neighboring columns between the same two inputs are summed before they are added.
        const int32_t left = first[j], right = second[j];
        float to_left = 0.0f, to_right = 0.0f;
        for (; j < taps_.out && first[j] == left && second[j] == right; ++j) {
          to_left += first_weight[j] * stretched[j];
          to_right += second_weight[j] * stretched[j];
        }
        grad[left] += to_left;
        grad[right] += to_right;
      }
      return;
    }
    switch (phases_.ratio) {
      case 2:
        contract_columns<2>(stretched, grad);
        break;
      case 4:
        contract_columns<4>(stretched, grad);
        break;
      case 8:
        contract_columns<8>(stretched, grad);
        break;
      default:
        contract_columns<0>(stretched, grad);
    }
    // The border pixels also stand for those beyond them.
    for (int k = 0; k < phases_.ratio; ++k) {
      const float* at = stretched + k * phases_.stride;
      if (phases_.first[k] < 0) grad[0] += at[0] * phases_.first_weight[k];
      if (phases_.second[k] > 0) grad[w_ - 1] += at[w_ - 1] * phases_.second_weight[k];
    }
  }

  // Brings the bytes of a row into the order of the stretched columns.
  void reorder(const int8_t* in, int8_t* out) const {
    switch (phases_.count) {
      case 1:
        memcpy(out, in, phases_.columns);
        break;
      case 2:
        split<2>(in, out);
        break;
      case 4:
        split<4>(in, out);
        break;
      case 8:
        split<8>(in, out);
        break;
      default:
        split<0>(in, out);
    }
  }

 private:
  // With a ratio of kRatio; 0: phases_.ratio. A constant number of weights and addresses stays in registers.
  template <int kRatio>
  void contract_columns(const float* stretched, float* grad) const {
    const int ratio = kRatio > 0 ? kRatio : phases_.ratio;
    constexpr int kMost = kRatio > 0 ? kRatio : Phases::kMaxRatio;
    const float* taps[2 * kMost];
    float weights[2 * kMost];
    for (int k = 0; k < ratio; ++k) {
      taps[2 * k] = stretched + k * phases_.stride - phases_.first[k];
      taps[2 * k + 1] = stretched + k * phases_.stride - phases_.second[k];
      weights[2 * k] = phases_.first_weight[k];
      weights[2 * k + 1] = phases_.second_weight[k];
    }
    for (int64_t c = 0; c < w_; c += kLanes) {
      vfloat sum = {};
#pragma GCC unroll 16
      for (int k = 0; k < 2 * ratio; ++k) sum = fma(load(taps[k] + c), splat(weights[k]), sum);
      store(grad + c, sum);
    }
  }

  // With kPhases phases; 0: phases_.count. Of a constant number, the compiler makes vectors, if all bytes of a column
  // are read together: it would read others one at a time near the row's end.
  template <int kPhases>
  void split(const int8_t* __restrict in, int8_t* __restrict out) const {
    const int64_t phases = kPhases > 0 ? kPhases : phases_.count;
    const int64_t columns = phases_.columns, stride = phases_.stride;
#if !defined(__clang__)
#pragma GCC ivdep
#endif
    for (int64_t c = 0; c < columns; ++c) {
#pragma GCC unroll 8
      for (int64_t k = 0; k < phases; ++k) out[k * stride + c] = in[c * phases + k];
    }
  }

  const int64_t w_;
  const Taps& taps_;
  const Phases& phases_;
};

}  // namespace fastmask::FASTMASK_SIMD
