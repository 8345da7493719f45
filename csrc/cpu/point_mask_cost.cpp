#include "cpu/point_mask_cost.h"

#include "cpu/gather.h"
#include "cpu/softmax.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

static_assert(kLanes <= kPointCostGroup && kSoftmaxBlock <= kMaskCostBlock);

// Points after which float sums are added to the double ones: over all of them their rounding would show.
constexpr int64_t kFlush = 128;

// Two neighboring rows of the map with its border, columns outermost: [w + 2][kLanes].
class TurnedRows {
 public:
  TurnedRows(const void* logits, const int64_t* offsets, int64_t queries, Dtype dtype, int64_t h, int64_t w,
             float* scratch)
      : logits_(logits), offsets_(offsets), queries_(queries), dtype_(dtype), h_(h), w_(w) {
    padded_ = (w + 15) / 16 * 16;
    lines_ = scratch;
    rows_[0] = lines_ + padded_ * kLanes;
    rows_[1] = rows_[0] + (padded_ + 2) * kLanes;
  }

  // Row 0..h+1, the border's included; must be one of the last two asked for or a later one.
  const float* row(int64_t index) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == index) return rows_[slot];
    }
    const int slot = held_[0] <= held_[1] ? 0 : 1;
    held_[slot] = index;
    fill(index, rows_[slot]);
    return rows_[slot];
  }

 private:
  void fill(int64_t index, float* out) {
    if (index == 0 || index == h_ + 1) {
      memset(out, 0, sizeof(float) * (w_ + 2) * kLanes);
      return;
    }
    for (int64_t query = 0; query < kLanes; ++query) {
      const int64_t source = offsets_[query < queries_ ? query : queries_ - 1];
      load_logits(logits_, dtype_, source + (index - 1) * w_, w_, lines_ + query * padded_);
    }
    store(out, vfloat{});
    for (int64_t column = 0; column < w_; column += kLanes) {
      vfloat block[kLanes];
      for (int query = 0; query < kLanes; ++query) block[query] = load(lines_ + query * padded_ + column);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(out + (column + 1 + i) * kLanes, block[i]);
    }
    store(out + (w_ + 1) * kLanes, vfloat{});
  }

  const void* logits_;
  const int64_t* offsets_;
  int64_t queries_;
  Dtype dtype_;
  int64_t h_, w_, padded_;
  float* lines_;
  float* rows_[2];
  int64_t held_[2] = {-2, -1};
};

struct Terms {
  vfloat probability, foreground, background;  // p, F+, F-
};

template <bool kFocal, bool kSquare>
inline Terms terms_at(const PointTaps& taps, const float* upper, const float* lower, MaskTerm term) {
  const int64_t at = static_cast<int64_t>(taps.column) * kLanes;
  const float* corners[4] = {upper + at, upper + at + kLanes, lower + at, lower + at + kLanes};
  vfloat x = {};
  for (int i = 0; i < 4; ++i) {
    if (taps.weights[i] != 0.0f) x = fma(load(corners[i]), splat(taps.weights[i]), x);  // 0 * inf is NaN
  }
  const Sigmoid s = sigmoid(x);
  Terms terms{s.p, s.softplus_neg, s.softplus_pos};
  if (kFocal) {
    terms.foreground *= term.alpha * focal_power<kSquare>(s.q, s.softplus_pos, term.gamma);
    terms.background *= (1.0f - term.alpha) * focal_power<kSquare>(s.p, s.softplus_neg, term.gamma);
  }
  return terms;
}

inline void add(float* sum, vfloat v) { store(sum, load(sum) + v); }

// Sums over the points of p T, F+ T and F- T for each target and, in the last slot, of v p, nothing and v F-:
// sums [targets + 1][kMaskCostSums][kLanes].
template <bool kFocal, bool kSquare>
void accumulate(TurnedRows rows, const PointView& points, MaskTerm term, float* partial, double* sums) {
  const int64_t values = (points.targets + 1) * kMaskCostSums * kLanes;
  float* all = partial + points.targets * kMaskCostSums * kLanes;
  memset(partial, 0, sizeof(float) * values);
  for (int64_t i = 0; i < values; ++i) sums[i] = 0;
  const MixedPoint* mixed = points.mixed;
  int64_t unflushed = 0;
  for (const PointRun* run = points.runs; run != points.runs + points.num_runs; ++run) {
    const float* upper = rows.row(run->row);
    const float* lower = rows.row(run->row + 1);
    if (run->target == kMixed) {
      for (int64_t i = run->begin; i < run->end; ++i, ++mixed) {
        const Terms terms = terms_at<kFocal, kSquare>(points.taps[i], upper, lower, term);
        add(all, mixed->weight * terms.probability);
        add(all + 2 * kLanes, mixed->weight * terms.background);
        for (const PointShare* share = points.shares + mixed->begin; share != points.shares + mixed->end; ++share) {
          float* of_target = partial + share->target * kMaskCostSums * kLanes;
          add(of_target, share->share * terms.probability);
          add(of_target + kLanes, share->share * terms.foreground);
          add(of_target + 2 * kLanes, share->share * terms.background);
        }
      }
    } else {
      Terms total{};
      for (int64_t i = run->begin; i < run->end; ++i) {
        const Terms terms = terms_at<kFocal, kSquare>(points.taps[i], upper, lower, term);
        total.probability += terms.probability;
        total.foreground += terms.foreground;
        total.background += terms.background;
      }
      add(all, total.probability);
      add(all + 2 * kLanes, total.background);
      if (run->target != kBackground) {
        float* of_target = partial + run->target * kMaskCostSums * kLanes;
        add(of_target, total.probability);
        add(of_target + kLanes, total.foreground);
        add(of_target + 2 * kLanes, total.background);
      }
    }
    unflushed += run->end - run->begin;
    if (unflushed >= kFlush || run + 1 == points.runs + points.num_runs) {
      for (int64_t i = 0; i < values; ++i) sums[i] += partial[i];
      memset(partial, 0, sizeof(float) * values);
      unflushed = 0;
    }
  }
}

}  // namespace

int64_t point_mask_cost_lanes() { return kLanes; }

void point_mask_cost_group(const void* class_logits, const int64_t* class_offsets, int64_t classes, Dtype class_dtype,
                           const void* mask_logits, const int64_t* mask_offsets, int64_t h, int64_t w, Dtype mask_dtype,
                           int64_t queries, const int64_t* labels, const PointView& points, MaskTerm term,
                           MaskCostWeights weights, float* scratch, float* const* cost_rows) {
  const int64_t slots = points.targets + 1;
  float* block = scratch;
  double* sums = reinterpret_cast<double*>(block + kMaskCostBlock);
  float* partial = reinterpret_cast<float*>(sums + slots * kMaskCostSums * kLanes);
  float* lines = partial + slots * kMaskCostSums * kLanes;
  const auto run = !term.focal          ? accumulate<false, true>
                   : term.gamma == 2.0f ? accumulate<true, true>
                                        : accumulate<true, false>;
  run(TurnedRows(mask_logits, mask_offsets, queries, mask_dtype, h, w, lines), points, term, partial, sums);
  const double weight = points.weight > 1.0 ? points.weight : 1.0;
  const double* all = sums + points.targets * kMaskCostSums * kLanes;
  for (int64_t query = 0; query < queries; ++query) {
    const Softmax softmax = softmax_of(class_logits, class_offsets[query], classes, class_dtype, block);
    const double prediction = all[query];
    const double negative = all[2 * kLanes + query];
    for (int64_t m = 0; m < points.targets; ++m) {
      const double* of_target = sums + m * kMaskCostSums * kLanes + query;
      const double mask_cost = (of_target[kLanes] + (negative - of_target[2 * kLanes])) / weight;
      const double dice_cost = 1.0 - (2.0 * of_target[0] + 1.0) / (prediction + points.areas[m] + 1.0);
      const double probability = probability_at(softmax, class_logits, class_dtype, class_offsets[query] + labels[m]);
      cost_rows[query][m] = static_cast<float>(-weights.cost_class * probability + weights.cost_mask * mask_cost +
                                               weights.cost_dice * dice_cost);
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
