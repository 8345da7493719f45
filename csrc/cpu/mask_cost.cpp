#include "cpu/mask_cost.h"

#include "cpu/softmax.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int64_t kBlock = kMaskCostBlock;
static_assert(kSoftmaxBlock <= kBlock);
constexpr int kParts = kChunk / kLanes;

struct Totals {
  double probability = 0;  // sum_c p[c]
  double negative = 0;     // sum_c F-[c]
};

// Adds each target's sums of p, F+ and F- over its pixels, 16 lanes apart, and returns the row's totals.
template <bool kFocal, bool kSquare>
Totals accumulate(const void* logits, int64_t offset, int64_t pixels, Dtype dtype, const CoverageView& coverage,
                  MaskTerm term, float* blocks, float* sums) {
  float* x_block = blocks;  // [kBlock], and then one block for each of the kMaskCostSums terms
  Totals totals;
  const CoverageEntry* entry = coverage.entries;
  const CoverageEntry* const last_entry = entry + coverage.num_entries;

  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    const int64_t count = pixels - begin < kBlock ? pixels - begin : kBlock;
    const int64_t first_chunk = begin / kChunk;
    const int64_t last_chunk = first_chunk + (count + kChunk - 1) / kChunk;
    load_logits(logits, dtype, offset + begin, count, x_block);
    // Over all pixels of a large map the rounding of one float sum would exceed the reference's; a block's does not.
    vfloat probability[kParts] = {};
    vfloat negative[kParts] = {};

    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int32_t valid = coverage.valid[chunk];
      for (int part = 0; part < kParts; ++part) {
        float* at = x_block + (chunk - first_chunk) * kChunk + part * kLanes;
        const Sigmoid s = sigmoid(load(at));
        vfloat foreground = s.softplus_neg;
        vfloat background = s.softplus_pos;
        if (kFocal) {
          foreground *= term.alpha * focal_power<kSquare>(s.q, s.softplus_pos, term.gamma);
          background *= (1.0f - term.alpha) * focal_power<kSquare>(s.p, s.softplus_neg, term.gamma);
        }
        store(at + kBlock, s.p);
        store(at + 2 * kBlock, foreground);
        store(at + 3 * kBlock, background);
        const vint counted = select(valid, part);
        probability[part] += masked(counted, s.p);
        negative[part] += masked(counted, background);
      }
    }

    for (int part = 0; part < kParts; ++part) {
      totals.probability += sum_lanes(probability[part]);
      totals.negative += sum_lanes(negative[part]);
    }
    for (; entry != last_entry && entry->chunk < last_chunk; ++entry) {
      float* target_sums = sums + entry->target * kMaskCostSums * kChunk;
      for (int part = 0; part < kParts; ++part) {
        const float* at = x_block + (entry->chunk - first_chunk) * kChunk + part * kLanes;
        const vint covered = select(entry->lanes, part);
        for (int k = 0; k < kMaskCostSums; ++k) {
          float* sum = target_sums + k * kChunk + part * kLanes;
          store(sum, load(sum) + masked(covered, load(at + (k + 1) * kBlock)));
        }
      }
    }
  }
  return totals;
}

double sum_chunk(const float* values) {
  double total = 0;
  for (int64_t i = 0; i < kChunk; ++i) total += values[i];
  return total;
}

}  // namespace

void mask_cost_row(const void* class_logits, int64_t class_offset, int64_t classes, Dtype class_dtype,
                   const void* mask_logits, int64_t mask_offset, int64_t pixels, Dtype mask_dtype,
                   const int64_t* labels, const CoverageView& coverage, MaskTerm term, MaskCostWeights weights,
                   float* scratch, float* cost) {
  const int64_t targets = coverage.targets;
  float* block = scratch;
  float* sums = scratch + (1 + kMaskCostSums) * kBlock;
  memset(sums, 0, sizeof(float) * kMaskCostSums * kChunk * targets);
  const auto run = !term.focal          ? accumulate<false, true>
                   : term.gamma == 2.0f ? accumulate<true, true>
                                        : accumulate<true, false>;
  const Totals totals = run(mask_logits, mask_offset, pixels, mask_dtype, coverage, term, block, sums);
  const Softmax softmax = softmax_of(class_logits, class_offset, classes, class_dtype, block);
  const double counted = coverage.pixels > 0 ? static_cast<double>(coverage.pixels) : 1.0;
  for (int64_t m = 0; m < targets; ++m) {
    const float* target_sums = sums + m * kMaskCostSums * kChunk;
    const double intersection = sum_chunk(target_sums);
    const double foreground = sum_chunk(target_sums + kChunk);
    const double background = totals.negative - sum_chunk(target_sums + 2 * kChunk);
    const double mask_cost = (foreground + background) / counted;
    const double dice_cost = 1.0 - (2.0 * intersection + 1.0) / (totals.probability + coverage.areas[m] + 1.0);
    const double probability = probability_at(softmax, class_logits, class_dtype, class_offset + labels[m]);
    cost[m] = static_cast<float>(-weights.cost_class * probability + weights.cost_mask * mask_cost +
                                 weights.cost_dice * dice_cost);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
