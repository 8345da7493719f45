// Chooses the queries that a tile of pixels needs; all others together add too little to any class to change a label.
#pragma once

#include "cpu/semantic.h"
#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Let b_n >= sigmoid(x_n) = s_n at all pixels of the tile, S the chosen queries, and a_n any number, here the median of
// P[n, k] over k. The other queries add two sums to the score of class k: sum a_n s_n, the same for all classes, and
// sum (P[n, k] - a_n) s_n, which lies within -below[k]..above[k] with above[k] = sum of b_n max(P[n, k] - a_n, 0) and
// below[k] = sum of b_n max(a_n - P[n, k], 0). So with u[k] = above[k] + sum over S of P[n, k] s_n, the class c has the
// largest score if u[c] exceeds all others by more than width[c] = above[c] + below[c] = sum of b_n |P[n, c] - a_n|.
class QueryChoice {
 public:
  QueryChoice(const ClassTable& table, const QueryChoiceWorkspace& work) : table_(table), work_(work) {
    while ((int64_t{1} << tag_bits_) < table.classes) ++tag_bits_;
    // A score is a sum of at most N terms of one sign: each addition, and each rounded product, has an error of at most
    // 2^-24 of it. The same holds for u, the width, and the exact scores of both classes. The tag replaces tag_bits_
    // bits.
    rounding_ = static_cast<float>(8 * table.queries + 64) * 0x1p-23f + static_cast<float>(4 << tag_bits_) * 0x1p-23f;
  }

  // b_n, [to_full_vectors(N)]; set them before choose().
  float* bounds() { return work_.bounds; }

  // Leaves out queries in order of increasing bound while their sum is small. Returns false if most of them remain.
  bool choose() {
    const int64_t queries = table_.queries;
    sort_by_weight();
    const float tolerance = work_.weights[work_.order[queries - 1]] * kTolerance;
    const int64_t classes = to_full_vectors(table_.classes);
    memset(work_.above, 0, sizeof(float) * classes);
    memset(work_.width, 0, sizeof(float) * classes);
    common_ = 0.0f;
    int64_t left_out = 0;
    while (left_out + kTogether <= queries && add<kTogether>(work_.order + left_out, tolerance)) left_out += kTogether;
    while (left_out < queries && add<1>(work_.order + left_out, tolerance)) ++left_out;
    chosen_ = work_.order + left_out;
    count_ = queries - left_out;
    return 4 * count_ <= 3 * queries;
  }

  const int32_t* chosen() const { return chosen_; }
  int64_t count() const { return count_; }
  const float* above() const { return work_.above; }  // [classes]
  int32_t tag_mask() const { return (1 << tag_bits_) - 1; }

  // How far the largest u must exceed the next largest for its class to be certain.
  vfloat doubt(vfloat u, vint label) const {
    const vfloat width = gather(work_.width, label);
    return fma(u + width + common_, splat(rounding_), width + 1e-30f);
  }

 private:
  static constexpr int kTogether = 4;
  static constexpr float kTolerance = 0x1p-3f;
  // Weights are sorted by exponent and the first two bits of the mantissa, from 2^-20 to 1.
  static constexpr int32_t kLowestKey = (127 - 20) << 2;
  static constexpr int32_t kKeys = 20 * 4 + 2;

  // Leaves out kCount more queries, unless that makes some width exceed the tolerance.
  template <int kCount>
  bool add(const int32_t* queries, float tolerance) {
    const int64_t classes = to_full_vectors(table_.classes);
    const float* rows[kCount];
    vfloat middles[kCount], bounds[kCount];
    float common = common_;
    for (int i = 0; i < kCount; ++i) {
      const int32_t n = queries[i];
      rows[i] = table_.rows + n * classes;
      middles[i] = splat(table_.middles[n]);
      bounds[i] = splat(work_.bounds[n]);
      common += work_.bounds[n] * table_.middles[n];
    }
    vfloat most{};
    for (int64_t k = 0; k < classes; k += kLanes) {
      vfloat width = load(work_.width + k), above = load(work_.above + k);
      for (int i = 0; i < kCount; ++i) {
        const vfloat d = load(rows[i] + k) - middles[i];
        width = fma(maximum(d, -d), bounds[i], width);
        above = fma(maximum(d, vfloat{}), bounds[i], above);
      }
      store(work_.next_width + k, width);
      store(work_.next_above + k, above);
      most = maximum(most, width);
    }
    if (lane_bits(most <= splat(tolerance)) != kAllLanes) return false;
    exchange(work_.above, work_.next_above);
    exchange(work_.width, work_.next_width);
    common_ = common;
    return true;
  }

  static void exchange(float*& a, float*& b) {
    float* const kept = a;
    a = b;
    b = kept;
  }

  void sort_by_weight() {
    const int64_t queries = table_.queries, padded = to_full_vectors(queries);
    for (int64_t n = 0; n < padded; n += kLanes) {
      const vfloat weight = load(work_.bounds + n) * load(table_.peaks + n);
      store(work_.weights + n, weight);
      vint key = (bits(weight) >> 21) - splat(kLowestKey);
      key = key < 0 ? vint{} : key;
      store(work_.keys + n, key > kKeys - 1 ? splat(kKeys - 1) : key);
    }
    int32_t place[kKeys + 1] = {};
    for (int64_t n = 0; n < queries; ++n) ++place[work_.keys[n] + 1];
    for (int32_t key = 0; key < kKeys; ++key) place[key + 1] += place[key];
    for (int64_t n = 0; n < queries; ++n) work_.order[place[work_.keys[n]]++] = static_cast<int32_t>(n);
  }

  const ClassTable& table_;
  QueryChoiceWorkspace work_;
  const int32_t* chosen_ = nullptr;
  int64_t count_ = 0;
  int32_t tag_bits_ = 0;
  float rounding_, common_ = 0.0f;
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
