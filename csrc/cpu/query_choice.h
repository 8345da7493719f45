// Which queries a tile of pixels needs: the others, together, add too little to any class to matter.
#pragma once

#include "cpu/mask_strip.h"
#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// With b_n >= sigmoid(x_n) at all pixels of the tile, queries outside the chosen set S add to class k at most
// rest[k] = sum over n not in S of P[n, k] b_n. So rest[k] + sum over S of P[n, k] sigmoid(x_n) bounds the score of k
// from above, without rest[k] from below: a class whose bound exceeds all others' by more than max_k rest[k] (and
// rounding) has the largest score.
class QueryChoice {
 public:
  QueryChoice(const ClassTable& table, Scratch& scratch) : table_(table) {
    const int64_t queries = to_full_vectors(table.queries), classes = to_full_vectors(table.classes);
    bounds_ = scratch.take(queries);
    weights_ = scratch.take(queries);
    keys_ = scratch.take<int32_t>(queries);
    order_ = scratch.take<int32_t>(queries);
    rest_ = scratch.take(classes);
    next_rest_ = scratch.take(classes);
    while ((int64_t{1} << tag_bits_) < table.classes) ++tag_bits_;
    // A score is a sum of N terms that are positive: each addition errs by at most 2^-24 of it, or twice that where
    // products are rounded too; here and in the sum that is to be predicted. The tag takes the place of tag_bits_ bits.
    rounding_ = static_cast<float>(4 * table.queries + 64) * 0x1p-23f + static_cast<float>(4 << tag_bits_) * 0x1p-23f;
  }

  // [to_full_vectors(N)] b_n, to be set before choose().
  float* bounds() { return bounds_; }

  // Leaves out queries by rising bound while the rest stays small. False if that leaves most of them in.
  bool choose() {
    const int64_t queries = table_.queries;
    sort_by_weight();
    const float tolerance = weights_[order_[queries - 1]] * kTolerance;
    const int64_t classes = to_full_vectors(table_.classes);
    memset(rest_, 0, sizeof(float) * classes);
    most_ = 0.0f;
    int64_t left_out = 0;
    for (; left_out < queries; ++left_out) {
      const int32_t n = order_[left_out];
      const vfloat bound = splat(bounds_[n]);
      vfloat most{};
      for (int64_t k = 0; k < classes; k += kLanes) {
        const vfloat sum = fma(bound, load(table_.rows + n * classes + k), load(rest_ + k));
        store(next_rest_ + k, sum);
        most = maximum(most, sum);
      }
      float largest = most[0];
      for (int i = 1; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
      if (!(largest <= tolerance)) break;
      most_ = largest;
      float* const swap = rest_;
      rest_ = next_rest_;
      next_rest_ = swap;
    }
    chosen_ = order_ + left_out;
    count_ = queries - left_out;
    return 4 * count_ <= 3 * queries;
  }

  const int32_t* chosen() const { return chosen_; }
  int64_t count() const { return count_; }
  const float* rest() const { return rest_; }  // [classes]
  int32_t tag_mask() const { return (1 << tag_bits_) - 1; }

  // By how much the bound `best` must exceed the next for its class to be certain.
  vfloat doubt(vfloat best) const { return fma(best, splat(rounding_), splat(most_ + 1e-30f)); }

 private:
  static constexpr float kTolerance = 0x1p-4f;
  // Weights are sorted by exponent and the first two bits of the mantissa, from 2^-20 to 1.
  static constexpr int32_t kLowestKey = (127 - 20) << 2;
  static constexpr int32_t kKeys = 20 * 4 + 2;

  void sort_by_weight() {
    const int64_t queries = table_.queries, padded = to_full_vectors(queries);
    for (int64_t n = 0; n < padded; n += kLanes) {
      const vfloat weight = load(bounds_ + n) * load(table_.peaks + n);
      store(weights_ + n, weight);
      vint key = (bits(weight) >> 21) - splat(kLowestKey);
      key = key < 0 ? vint{} : key;
      store(keys_ + n, key > kKeys - 1 ? splat(kKeys - 1) : key);
    }
    int32_t place[kKeys + 1] = {};
    for (int64_t n = 0; n < queries; ++n) ++place[keys_[n] + 1];
    for (int32_t key = 0; key < kKeys; ++key) place[key + 1] += place[key];
    for (int64_t n = 0; n < queries; ++n) order_[place[keys_[n]]++] = static_cast<int32_t>(n);
  }

  const ClassTable& table_;
  float *bounds_, *weights_, *rest_, *next_rest_;
  int32_t *keys_, *order_;
  const int32_t* chosen_ = nullptr;
  int64_t count_ = 0;
  int32_t tag_bits_ = 0;
  float rounding_, most_ = 0.0f;
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
