#include "cpu/panoptic.h"

#include "cpu/tile.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Exceeds the rounding error of a resampled logit (a dozen roundings, relative to the largest logit that it reads), and
// of a probability and its product with the score.
constexpr float kLogitSlack = 2e-6f;
constexpr float kProbabilitySlack = 1e-5f;

constexpr int32_t kNobody = -2;  // no query has won the pixel so far

enum class Coverage { kNone, kSome, kAll };

// score * sigmoid(x) = score / (1 + exp(-x)): comparing fractions by cross-multiplication saves a division per pixel.
// Logits below -87 count as equal, so that nothing overflows; NaN never wins.
template <bool kProbabilities, bool kClip>
int64_t compete(const float* values, int64_t pixels, float score, int32_t marker, float threshold,
                const PanopticWinners& winners) {
  vint area = {};
  for (int64_t j = 0; j < pixels; j += kLanes) {
    const vfloat x = load(values + j);
    const vint inside = x >= threshold;
    const vfloat best = load(winners.numerator + j);
    vint better;
    if (kProbabilities) {
      const vfloat key = x * score;
      better = key > best;
      store(winners.numerator + j, better ? key : best);
    } else {
      const vfloat denominator = load(winners.denominator + j);
      const vfloat own = 1.0f + exp_neg(x < -87.0f ? splat(-87.0f) : x);
      better = score * denominator > best * own;
      store(winners.numerator + j, better ? splat(score) : best);
      store(winners.denominator + j, better ? own : denominator);
    }
    const vint mark = kClip ? marker - inside : splat(marker + 1);
    store(winners.winner + j, better ? mark : load(winners.winner + j));
    area -= inside;
  }
  return sum_lanes<int64_t>(area);
}

int64_t count_inside(const float* values, int64_t pixels, float threshold) {
  vint area = {};
  for (int64_t j = 0; j < pixels; j += kLanes) area -= load(values + j) >= threshold;
  return sum_lanes<int64_t>(area);
}

// Counts the pixels won and kept by the query whose marks are marker and marker + 1.
void count_won(const int32_t* winner, int64_t pixels, int32_t marker, PanopticAreas& areas) {
  vint clipped = {}, kept = {};
  for (int64_t j = 0; j < pixels; j += kLanes) {
    const vint mark = load(winner + j);
    clipped -= mark == marker;
    kept -= mark == marker + 1;
  }
  areas.won += sum_lanes<int64_t>(clipped + kept);
  areas.visible += sum_lanes<int64_t>(kept);
}

// Finds the bounds of all tiles of a band.
void look_ahead(const KeptQueries& kept, const TilePlan* plans, int64_t columns, const PanopticWorkspace& work) {
  const PanopticOutlook& outlook = work.outlook;
  const int64_t stride = to_full_vectors(kept.count);
  for (int64_t i = 0; i < stride; ++i) {
    if (i < kept.count) find_band_bounds(kept.planes[i], plans[0], work.bounds);
    for (int64_t column = 0; column < columns; ++column) {
      const Range range = i < kept.count ? range_of_tile(plans[column], work.bounds) : Range{0.0f, 0.0f};
      const float slack = kLogitSlack * (-range.low > range.high ? -range.low : range.high);
      outlook.low[column * stride + i] = range.low - slack;
      outlook.high[column * stride + i] = range.high + slack;
    }
  }
  for (int64_t i = 0; i < kept.count; i += kLanes) {
    const vfloat upper_score =
        by_lane<vfloat>([&](int lane) { return i + lane < kept.count ? kept.scores[i + lane] : 0.0f; });
    const vfloat lower_score = by_lane<vfloat>(
        [&](int lane) { return i + lane < kept.count && kept.nans[i + lane] == 0 ? kept.scores[i + lane] : 0.0f; });
    for (int64_t at = i; at < columns * stride; at += stride) {
      const vfloat low = probability(load(outlook.low + at)) * (1.0f - kProbabilitySlack);
      const vfloat high = probability(load(outlook.high + at)) * (1.0f + kProbabilitySlack);
      store(outlook.lower + at, lower_score * low);
      store(outlook.upper + at, upper_score * high);
      if (plans[0].probabilities) {
        store(outlook.low + at, low);
        store(outlook.high + at, high);
      }
    }
  }
}

// How much of a tile is inside a query's mask, as far as the bounds tell.
Coverage coverage(const PanopticOutlook& outlook, int64_t i, float threshold) {
  if (outlook.high[i] < threshold) return Coverage::kNone;
  const bool nan = outlook.lower[i] == 0.0f;
  return !nan && outlook.low[i] >= threshold ? Coverage::kAll : Coverage::kSome;
}

void fill(int32_t* winner, int64_t width, const TilePlan& plan, int32_t value) {
  for (int64_t i = 0; i < plan.rows.count; ++i) {
    for (int64_t j = 0; j < plan.columns.count; ++j) winner[i * width + j] = value;
  }
}

void panoptic_tile(const KeptQueries& kept, const TilePlan& plan, const PanopticRule& rule,
                   const PanopticWorkspace& work, const PanopticOutlook& outlook, int32_t* winner, int64_t width,
                   PanopticAreas* areas) {
  const PanopticWinners& winners = work.winners;
  const float* const values = work.tile.values;
  const float threshold = plan.probabilities ? rule.mask_threshold : rule.logit_threshold;

  float least = 0;  // a lower bound for the winner of every pixel
  for (int64_t i = 0; i < kept.count; ++i) least = outlook.lower[i] > least ? outlook.lower[i] : least;
  int64_t candidates = 0, only = -1;
  for (int64_t i = 0; i < kept.count; ++i) {
    if (outlook.upper[i] < least) continue;
    ++candidates;
    only = i;
  }
  // No other query can win, and the only candidate has no NaN here.
  const bool decided = candidates == 1 && outlook.lower[only] > 0;
  const int64_t pixels = plan.rows.count * plan.columns.stride;
  const int64_t visible_pixels = plan.rows.count * plan.columns.count;
  bool constant = kept.count == 0 || decided;
  if (decided) {
    const Coverage own = coverage(outlook, only, threshold);
    if (rule.clip_to_mask && own == Coverage::kSome) {
      constant = false;
    } else {
      const bool keeps = !rule.clip_to_mask || own == Coverage::kAll;
      areas[only].won += visible_pixels;
      areas[only].visible += keeps ? visible_pixels : 0;
      fill(winner, width, plan, keeps ? kept.queries[only] : -1);
    }
  } else if (kept.count == 0) {
    fill(winner, width, plan, -1);
  }
  if (!constant) {
    for (int64_t j = 0; j < pixels; ++j) {
      winners.numerator[j] = plan.probabilities ? -1 : 0;
      winners.denominator[j] = 1;
      winners.winner[j] = kNobody;
    }
  }
  const auto run = plan.probabilities ? (rule.clip_to_mask ? compete<true, true> : compete<true, false>)
                                      : (rule.clip_to_mask ? compete<false, true> : compete<false, false>);
  for (int64_t i = 0; i < kept.count; ++i) {
    const bool competes = !constant && outlook.upper[i] >= least;
    const Coverage own = coverage(outlook, i, threshold);
    if (!competes && own != Coverage::kSome) {
      areas[i].mask += own == Coverage::kAll ? visible_pixels : 0;
      continue;
    }
    resample_tile(kept.planes[i], plan, work.tile);
    if (competes) {
      areas[i].mask += run(values, pixels, kept.scores[i], 2 * kept.queries[i], threshold, winners);
    } else {
      areas[i].mask += count_inside(values, pixels, threshold);
    }
  }
  if (constant) return;
  for (int64_t i = 0; i < kept.count; ++i) {
    if (outlook.upper[i] >= least) count_won(winners.winner, pixels, 2 * kept.queries[i], areas[i]);
  }
  for (int64_t i = 0; i < plan.rows.count; ++i) {
    const int32_t* marks = winners.winner + i * plan.columns.stride;
    // -1 for even marks.
    for (int64_t j = 0; j < plan.columns.count; ++j) winner[i * width + j] = marks[j] >> 1 | ((marks[j] & 1) - 1);
  }
}

}  // namespace

void panoptic_band(const KeptQueries& kept, const TilePlan* plans, int64_t columns, const PanopticRule& rule,
                   const PanopticWorkspace& work, int32_t* winner, int64_t width, PanopticAreas* areas) {
  look_ahead(kept, plans, columns, work);
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t first = column * to_full_vectors(kept.count);
    const PanopticOutlook outlook{work.outlook.low + first, work.outlook.high + first, work.outlook.lower + first,
                                  work.outlook.upper + first};
    panoptic_tile(kept, plans[column], rule, work, outlook, winner + plans[column].columns.begin, width, areas);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
