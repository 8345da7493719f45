#include "common/taps.h"

#include <algorithm>
#include <cmath>

namespace fastmask {
namespace {

struct Tap {
  int64_t index;
  double weight;
};

// PyTorch's bilinear rule with align_corners=False. The second tap is left out where its weight is 0.
int bilinear_taps(int64_t i, int64_t in, int64_t out, Tap taps[2]) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double source = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
  const int64_t first = std::min(static_cast<int64_t>(source), in - 1);
  const double weight = source - static_cast<double>(first);
  if (weight <= 0.0 || first == in - 1) {
    taps[0] = {first, 1.0};
    return 1;
  }
  taps[0] = {first, 1.0 - weight};
  taps[1] = {first + 1, weight};
  return 2;
}

}  // namespace

AxisTaps::AxisTaps(int64_t grid, int64_t padded, int64_t valid, int64_t size, int64_t begin, int64_t count)
    : count_(count), stride_((count + kTapsPadding - 1) / kTapsPadding * kTapsPadding) {
  index_.resize(kMaxTaps * stride_);
  weight_.resize(kMaxTaps * stride_);
  for (int64_t i = 0; i < count; ++i) {
    Tap merged[kMaxTaps], outer[2], inner[2];
    int used = 0;
    const int outer_taps = bilinear_taps(begin + i, valid, size, outer);
    for (int o = 0; o < outer_taps; ++o) {
      const int inner_taps = bilinear_taps(outer[o].index, grid, padded, inner);
      for (int n = 0; n < inner_taps; ++n) {
        const double product = outer[o].weight * inner[n].weight;
        int at = 0;
        while (at < used && merged[at].index != inner[n].index) ++at;
        if (at == used) merged[used++] = {inner[n].index, 0.0};
        merged[at].weight += product;
      }
    }
    taps_ = std::max(taps_, used);
    const int64_t end = i + 1 == count ? stride_ : i + 1;
    for (int t = 0; t < kMaxTaps; ++t) {
      const Tap tap = t < used ? merged[t] : Tap{merged[used - 1].index, 0.0};
      std::fill(&index_[t * stride_ + i], &index_[t * stride_] + end, static_cast<int32_t>(tap.index));
      std::fill(&weight_[t * stride_ + i], &weight_[t * stride_] + end, static_cast<float>(tap.weight));
    }
  }
  index_.resize(taps_ * stride_);
  weight_.resize(taps_ * stride_);
  first_ = index_.front();
  end_ = index_.back() + 1;
}

void AxisTaps::count_from(int64_t origin) {
  for (int32_t& index : index_) index -= static_cast<int32_t>(origin);
  first_ -= static_cast<int32_t>(origin);
  end_ -= static_cast<int32_t>(origin);
}

}  // namespace fastmask
