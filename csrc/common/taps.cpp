#include "common/taps.h"

#include <algorithm>
#include <cmath>

namespace fastmask {
namespace {

struct Tap {
  int64_t index;
  double weight;
};

// The second tap is left out if its weight is 0.
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

TapTable::TapTable(int64_t count, int taps)
    : count_(count),
      stride_(round_up(count, kTapsPadding)),
      taps_(taps),
      index_(taps * stride_),
      weight_(taps * stride_) {}

// The last output also fills the padding.
void TapTable::set(int64_t i, int tap, int64_t index, float weight) {
  const int64_t begin = tap * stride_ + i, end = i + 1 == count_ ? (tap + 1) * stride_ : begin + 1;
  std::fill(index_.begin() + begin, index_.begin() + end, static_cast<int32_t>(index));
  std::fill(weight_.begin() + begin, weight_.begin() + end, weight);
}

TapTable::TapTable(int64_t in, int64_t out) : TapTable(out, 2) {
  for (int64_t i = 0; i < out; ++i) {
    const int64_t source = std::max<int64_t>((2 * i + 1) * in - out, 0);
    const int64_t first = std::min(source / (2 * out), in - 1), rest = source - first * 2 * out;
    const bool whole = rest == 0 || first == in - 1;
    const float weight = whole ? 0.5f : static_cast<float>(static_cast<double>(rest) / static_cast<double>(2 * out));
    set(i, 0, first, 1.0f - weight);
    set(i, 1, whole ? first : first + 1, weight);
  }
}

TapTable::TapTable(int64_t grid, int64_t padded, int64_t valid, int64_t size, int64_t begin, int64_t count)
    : TapTable(count, kMaxTaps) {
  taps_ = 1;
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
    for (int t = 0; t < kMaxTaps; ++t) {
      const Tap tap = t < used ? merged[t] : Tap{merged[used - 1].index, 0.0};
      set(i, t, tap.index, static_cast<float>(tap.weight));
    }
  }
  index_.resize(taps_ * stride_);
  weight_.resize(taps_ * stride_);
}

void TapTable::count_from(int64_t origin) {
  for (int32_t& index : index_) index -= static_cast<int32_t>(origin);
}

Phases::Phases(int64_t in, int64_t out) {
  if (out % in == 0 && out / in <= kMaxRatio) ratio = static_cast<int>(out / in);
  count = std::max(ratio, 1);
  columns = out / count;
  stride = to_full_vectors(columns) + kMostLanes;
  size = count * stride;
  if (ratio == 0) return;
  const TapTable three(int64_t{3}, int64_t{3} * ratio);  // the middle one's taps are those of every input
  const Taps taps = three.view();
  for (int k = 0; k < ratio; ++k) {
    const int64_t i = ratio + k, j = taps.stride + i;
    first[k] = taps.index[i] - 1;
    second[k] = taps.index[j] - 1;
    first_weight[k] = taps.weight[i];
    second_weight[k] = taps.weight[j];
  }
}

std::vector<int64_t> nearest_taps(int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  std::vector<int64_t> indices(out);
  for (int64_t i = 0; i < out; ++i) {
    indices[i] = in == out ? i : std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), in - 1);
  }
  return indices;
}

}  // namespace fastmask
