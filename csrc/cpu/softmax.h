// The class term of the matching cost, at the SIMD level of the including file.
#pragma once

#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {

constexpr int64_t kSoftmaxBlock = 1024;  // floats of its scratch memory

// softmax[k] = exp(x[k] - maximum) / sum; NaN everywhere if any logit is.
struct Softmax {
  float maximum;
  double sum;
};

static inline Softmax softmax_of(const void* logits, int64_t offset, int64_t classes, Dtype dtype, float* block) {
  float maximum = -__builtin_inff();
  bool nan = false;
  for (int64_t begin = 0; begin < classes; begin += kSoftmaxBlock) {
    const int64_t count = classes - begin < kSoftmaxBlock ? classes - begin : kSoftmaxBlock;
    load_logits(logits, dtype, offset + begin, count, block);
    for (int64_t i = 0; i < count; ++i) {
      nan |= block[i] != block[i];
      maximum = block[i] > maximum ? block[i] : maximum;
    }
  }
  double sum = 0;
  for (int64_t begin = 0; begin < classes; begin += kSoftmaxBlock) {
    const int64_t count = classes - begin < kSoftmaxBlock ? classes - begin : kSoftmaxBlock;
    load_logits(logits, dtype, offset + begin, count, block);
    for (int64_t i = count; i % 16 != 0; ++i) block[i] = -__builtin_inff();
    vfloat lanes = {};
    for (int64_t i = 0; i < count; i += kLanes) lanes += exp_neg(maximum - load(block + i));
    sum += sum_lanes(lanes);
  }
  return {nan ? __builtin_nanf("") : maximum, sum};
}

// softmax[k], k the class at element `index`.
static inline double probability_at(const Softmax& softmax, const void* logits, Dtype dtype, int64_t index) {
  float padded[16];
  load_logits(logits, dtype, index, 1, padded);
  return exp_neg(splat(softmax.maximum - padded[0]))[0] / softmax.sum;
}

}  // namespace fastmask::FASTMASK_SIMD
