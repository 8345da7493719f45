#include "cpu/mask_cost.h"

#include "cpu/mask_cost_sums.h"
#include "cpu/mask_terms.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int64_t kBlock = kMaskCostBlock;
constexpr int kParts = kChunk / kLanes;

// Adds each target's sums of p, F+ and F- over its pixels, 16 lanes apart, and returns the row's totals.
template <bool kFocal, bool kSquare>
CostTotals accumulate(Logits logits, int64_t pixels, const CoverageView& coverage, MaskTerm term, float* x_block,
                      float* sums) {
  vdouble probabilities{}, negatives{};
  const CoverageEntry* entry = coverage.entries;
  const CoverageEntry* const last_entry = entry + coverage.num_entries;

  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t count = pixels - begin < kBlock ? pixels - begin : kBlock;
    const int64_t first_chunk = begin / kChunk;
    const int64_t last_chunk = first_chunk + ceil_div(count, kChunk);
    const float* x = x_block;
    if (logits.dtype == Dtype::kFloat32 && count % kChunk == 0) {
      x = static_cast<const float*>(logits.data) + logits.offset + begin;
    } else {
      load_logits(after(logits, begin), count, x_block);
    }
    // Float sums run over one block: over all pixels of a large map, their rounding would exceed the reference's.
    vfloat probability[kParts] = {};
    vfloat negative[kParts] = {};

    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int32_t valid = coverage.valid[chunk];
      for (int part = 0; part < kParts; ++part) {
        const int64_t i = (chunk - first_chunk) * kChunk + part * kLanes;
        const PixelTerms terms = pixel_terms<kFocal, kSquare>(load(x + i), term);
        float* at = x_block + i;
        store(at + kBlock, terms.p);
        store(at + 2 * kBlock, terms.foreground);
        store(at + 3 * kBlock, terms.background);
        probability[part] = add_selected(probability[part], valid, part, terms.p);
        negative[part] = add_selected(negative[part], valid, part, terms.background);
      }
    }

    for (int part = 0; part < kParts; ++part) {
      probabilities += in_double(probability[part]);
      negatives += in_double(negative[part]);
    }
    while (entry != last_entry && entry->chunk < last_chunk) {
      const int32_t target = entry->target;
      vfloat of_target[kMaskCostSums][kParts] = {};
      for (; entry != last_entry && entry->target == target && entry->chunk < last_chunk; ++entry) {
        const float* at = x_block + (entry->chunk - first_chunk) * kChunk;
        for (int k = 0; k < kMaskCostSums; ++k) {
          for (int part = 0; part < kParts; ++part) {
            const vfloat terms = load(at + (k + 1) * kBlock + part * kLanes);
            of_target[k][part] = add_selected(of_target[k][part], entry->lanes, part, terms);
          }
        }
      }
      float* sum = sums + target * kMaskCostSums * kChunk;
      for (int k = 0; k < kMaskCostSums; ++k) {
        for (int part = 0; part < kParts; ++part, sum += kLanes) store(sum, load(sum) + of_target[k][part]);
      }
    }
  }
  return {sum_lanes(probabilities), sum_lanes(negatives), static_cast<double>(coverage.pixels)};
}

double sum_chunk(const float* values) {
  double total = 0;
  for (int64_t i = 0; i < kChunk; ++i) total += values[i];
  return total;
}

}  // namespace

void mask_cost_row(Logits class_logits, int64_t classes, Logits mask_logits, int64_t pixels, const int64_t* labels,
                   const CoverageView& coverage, const MaskCostRule& rule, const MaskCostWorkspace& work, float* cost) {
  memset(work.sums, 0, sizeof(float) * kMaskCostSums * kChunk * coverage.targets);
  const CostTotals totals = with_term(rule.term, [&]<bool kFocal, bool kSquare>() {
    return accumulate<kFocal, kSquare>(mask_logits, pixels, coverage, rule.term, work.block, work.sums);
  });
  const auto sums_of = [&](int64_t m) -> TargetSums {
    const float* sums = work.sums + m * kMaskCostSums * kChunk;
    return {sum_chunk(sums), sum_chunk(sums + kChunk), sum_chunk(sums + 2 * kChunk)};
  };
  write_costs(class_logits, classes, labels, coverage.targets, coverage.areas, totals, rule, work.block, sums_of, cost);
}

}  // namespace fastmask::FASTMASK_SIMD
