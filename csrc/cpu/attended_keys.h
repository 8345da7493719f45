// The keys that each query attends to (Mask2Former, arXiv:2112.01527, equation 2), as bits of patches of keys.
#pragma once

#include "cpu/masked_attention_tiles.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

static inline int64_t first_key_of(const AttentionPatches& patches, int64_t patch) {
  return patch / patches.across * patches.rows * patches.width + patch % patches.across * patches.columns;
}

// Finds the keys of each patch that the grid has, and those that are not padding.
static inline void find_present(const AttentionImage& image, const AttentionWorkspace& work) {
  const AttentionPatches& patches = image.patches;
  for (int64_t patch = 0; patch < patches.count; ++patch) {
    const int64_t first = first_key_of(patches, patch);
    const int64_t rows_left = patches.height - patch / patches.across * patches.rows;
    const int64_t columns_left = patches.width - patch % patches.across * patches.columns;
    uint32_t inside = 0, padding = 0;
    for (int64_t i = 0; i < kKeys; ++i) {
      if (i / patches.columns >= rows_left || i % patches.columns >= columns_left) continue;
      inside |= uint32_t{1} << i;
      if (image.mask.padding == nullptr) continue;
      padding |= static_cast<uint32_t>(image.mask.padding[first + work.steps[i]] != 0) << i;
    }
    work.inside[patch] = inside;
    work.present[patch] = inside & ~padding;
  }
}

// A row of a query's mask logits as float, in whole vectors, in `buffer` unless it lies in memory so.
static inline const float* float_row(const AttentionMask& mask, int64_t query, int64_t y, float* buffer) {
  const Logits row = after(row_of(mask.first, y), query * mask.stride);
  const int64_t w = mask.first.w;
  if (row.dtype == Dtype::kFloat32 && w % kLanes == 0) return static_cast<const float*>(row.data) + row.offset;
  load_logits(row, w, buffer);
  return buffer;
}

// Row y of the key grid: a query's mask logits, resampled to the grid's height but not to its width.
static inline const float* resampled_row(const AttentionMask& mask, int64_t query, int64_t y,
                                         const AttentionWorkspace& work) {
  const Taps& rows = mask.resampling.rows;
  if (rows.out == mask.first.h) {
    load_logits(after(row_of(mask.first, y), query * mask.stride), mask.first.w, work.mixed);
    return work.mixed;
  }
  const float* const upper = float_row(mask, query, rows.index[y], work.source[0]);
  const float* const lower = float_row(mask, query, rows.index[rows.stride + y], work.source[1]);
  const float upper_weight = rows.weight[y], lower_weight = rows.weight[rows.stride + y];
  for (int64_t x = 0; x < mask.first.w; x += kLanes) {
    store(work.mixed + x, load(upper + x) * upper_weight + load(lower + x) * lower_weight);
  }
  return work.mixed;
}

// p[0], p[kStep], p[2 kStep], ...
template <int kStep>
static inline vfloat every(const float* p) {
  if constexpr (kStep == 1) {
    return load(p);
  } else {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return shuffle<2 * kLane...>(every<kStep / 2>(p), every<kStep / 2>(p + kStep / 2 * kLanes));
    }(std::make_integer_sequence<int, kLanes>{});
  }
}

// Sets the bits of the keys in a query's foreground, where its mask logits, resampled to the centers of the grid's
// cells, are at least 0. Bits of keys beyond the grid may be set as well. kRatio is how many columns of logits a column
// of the grid has; 0: any number.
template <int kRatio>
static inline void find_foreground(const AttentionImage& image, int64_t query, uint32_t* attended, int64_t num_queries,
                                   const AttentionWorkspace& work) {
  const AttentionPatches& patches = image.patches;
  const Taps& columns = image.mask.resampling.columns;
  const int shift = __builtin_ctzll(patches.columns);
  const int64_t run = patches.columns < kLanes ? patches.columns : kLanes;
  for (int64_t y = 0; y < patches.height; ++y) {
    uint32_t* const words = attended + y / patches.rows * patches.across * num_queries;
    const int64_t first_bit = y % patches.rows * patches.columns;
    const float* const row = resampled_row(image.mask, query, y, work);
    for (int64_t x = 0; x < patches.width; x += kLanes) {
      vfloat sample;
      if constexpr (kRatio == 0) {
        const int32_t* const first = columns.index + x;
        const float* const weight = columns.weight + x;
        sample = gather(row, load(first)) * load(weight) +
                 gather(row, load(first + columns.stride)) * load(weight + columns.stride);
      } else if constexpr (kRatio == 1) {
        sample = load(row + x);
      } else {
        const float* const left = row + kRatio * x + kRatio / 2 - 1;
        sample = every<kRatio>(left) * 0.5f + every<kRatio>(left + 1) * 0.5f;
      }
      const uint32_t foreground = lane_bits(sample >= 0.0f);
      for (int64_t lane = 0; lane < kLanes && x + lane < patches.width; lane += run) {
        const uint32_t bits = foreground >> lane & ((1u << run) - 1);
        words[((x + lane) >> shift) * num_queries] |= bits << (first_bit + ((x + lane) & (patches.columns - 1)));
      }
    }
  }
}

static inline void find_foreground(const AttentionImage& image, int64_t query, uint32_t* attended, int64_t num_queries,
                                   const AttentionWorkspace& work) {
  const int64_t w = image.mask.first.w, width = image.patches.width;
  switch (w % width == 0 ? w / width : 0) {
    case 1:
      return find_foreground<1>(image, query, attended, num_queries, work);
    case 2:
      return find_foreground<2>(image, query, attended, num_queries, work);
    case 4:
      return find_foreground<4>(image, query, attended, num_queries, work);
    case 8:
      return find_foreground<8>(image, query, attended, num_queries, work);
    default:
      return find_foreground<0>(image, query, attended, num_queries, work);
  }
}

// Finds the keys that each query attends to: keys in its foreground that are not padding, or all others than padding if
// there are none.
static inline void find_attended(const AttentionImage& image, int64_t first_query, int64_t num_queries,
                                 const AttentionWorkspace& work) {
  const int64_t patches = image.patches.count, columns = image.patches.columns;
  for (int64_t i = 0; i < kKeys; ++i) {
    work.steps[i] = static_cast<int32_t>(i / columns * image.patches.width + i % columns);
  }
  find_present(image, work);
  int64_t present_keys = 0;
  for (int64_t patch = 0; patch < patches; ++patch) present_keys += __builtin_popcount(work.present[patch]);
  memset(work.attended, 0, sizeof(uint32_t) * patches * num_queries);
  for (int64_t n = 0; n < num_queries; ++n) {
    uint32_t* const attended = work.attended + n;
    int64_t keys = 0;
    if (image.mask.first.logits.data != nullptr) {
      find_foreground(image, first_query + n, attended, num_queries, work);
      for (int64_t patch = 0; patch < patches; ++patch) {
        attended[patch * num_queries] &= work.present[patch];
        keys += __builtin_popcount(attended[patch * num_queries]);
      }
    }
    work.keys[n] = static_cast<int32_t>(keys > 0 ? keys : present_keys);
    if (keys > 0) continue;
    for (int64_t patch = 0; patch < patches; ++patch) attended[patch * num_queries] = work.present[patch];
  }
}

}  // namespace fastmask::FASTMASK_SIMD
