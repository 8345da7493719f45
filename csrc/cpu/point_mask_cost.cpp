#include "cpu/point_mask_cost.h"

#include "cpu/held_rows.h"
#include "cpu/mask_cost_sums.h"
#include "cpu/mask_terms.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Float sums are added to double sums after this many points, because their rounding over all points would be too
// large.
constexpr int64_t kFlush = 128;

// Two neighboring rows of the maps with their border, columns outermost: [w + 2][kLanes].
class TransposedRows {
 public:
  TransposedRows(const Plane* planes, int64_t queries, const PointMaskCostWorkspace& work)
      : planes_(planes), queries_(queries), w_(planes[0].w), lines_(work.lines), rows_(work.rows) {}

  // Row 0..h+1, including the border.
  const float* row(int64_t index) {
    return rows_.row(index, [&](int64_t, float* out) { fill(index, out); });
  }

 private:
  void fill(int64_t index, float* out) {
    if (index == 0 || index == planes_[0].h + 1) {
      memset(out, 0, sizeof(float) * (w_ + 2) * kLanes);
      return;
    }
    const int64_t padded = to_full_vectors(w_);
    for (int64_t query = 0; query < kLanes; ++query) {
      const Plane& plane = planes_[query < queries_ ? query : queries_ - 1];
      load_logits(row_of(plane, index - 1), w_, lines_ + query * padded);
    }
    store(out, vfloat{});
    for (int64_t column = 0; column < w_; column += kLanes) {
      vfloat block[kLanes];
      for (int query = 0; query < kLanes; ++query) block[query] = load(lines_ + query * padded + column);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(out + (column + 1 + i) * kLanes, block[i]);
    }
    store(out + (w_ + 1) * kLanes, vfloat{});
  }

  const Plane* planes_;
  int64_t queries_, w_;
  float* lines_;
  HeldRows rows_;
};

template <bool kFocal, bool kSquare>
inline PixelTerms terms_at(const PointCorners& point, const float* upper, const float* lower, MaskTerm term) {
  const int64_t at = static_cast<int64_t>(point.column) * kLanes;
  const float* corners[4] = {upper + at, upper + at + kLanes, lower + at, lower + at + kLanes};
  vfloat x = {};
  for (int i = 0; i < 4; ++i) {
    if (point.weights[i] != 0.0f) x = fma(load(corners[i]), splat(point.weights[i]), x);  // 0 * inf is NaN
  }
  return pixel_terms<kFocal, kSquare>(x, term);
}

inline void add(float* sum, vfloat v) { store(sum, load(sum) + v); }

// Sums over the points of p T, F+ T and F- T for each target and, in the last slot, of v p, 0 and v F-:
// sums [targets + 1][kMaskCostSums][kLanes].
template <bool kFocal, bool kSquare>
void accumulate(TransposedRows rows, const PointView& points, MaskTerm term, float* partial, double* sums) {
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
        const PixelTerms terms = terms_at<kFocal, kSquare>(points.corners[i], upper, lower, term);
        add(all, mixed->weight * terms.p);
        add(all + 2 * kLanes, mixed->weight * terms.background);
        for (const PointShare* share = points.shares + mixed->begin; share != points.shares + mixed->end; ++share) {
          float* of_target = partial + share->target * kMaskCostSums * kLanes;
          add(of_target, share->share * terms.p);
          add(of_target + kLanes, share->share * terms.foreground);
          add(of_target + 2 * kLanes, share->share * terms.background);
        }
      }
    } else {
      PixelTerms total{};
      for (int64_t i = run->begin; i < run->end; ++i) {
        const PixelTerms terms = terms_at<kFocal, kSquare>(points.corners[i], upper, lower, term);
        total.p += terms.p;
        total.foreground += terms.foreground;
        total.background += terms.background;
      }
      add(all, total.p);
      add(all + 2 * kLanes, total.background);
      if (run->target != kBackground) {
        float* of_target = partial + run->target * kMaskCostSums * kLanes;
        add(of_target, total.p);
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

void point_mask_cost_group(const Logits* class_logits, int64_t classes, const Plane* planes, int64_t queries,
                           const int64_t* labels, const PointView& points, const MaskCostRule& rule,
                           const PointMaskCostWorkspace& work, float* const* cost_rows) {
  with_term(rule.term, [&]<bool kFocal, bool kSquare>() {
    accumulate<kFocal, kSquare>(TransposedRows(planes, queries, work), points, rule.term, work.partial, work.sums);
  });
  const double* all = work.sums + points.targets * kMaskCostSums * kLanes;
  for (int64_t query = 0; query < queries; ++query) {
    const auto sums_of = [&](int64_t m) -> TargetSums {
      const double* sums = work.sums + m * kMaskCostSums * kLanes + query;
      return {sums[0], sums[kLanes], sums[2 * kLanes]};
    };
    write_costs(class_logits[query], classes, labels, points.targets, points.areas,
                {all[query], all[2 * kLanes + query], points.weight}, rule, work.block, sums_of, cost_rows[query]);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
