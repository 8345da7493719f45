#include "cpu/panoptic.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/count_nan.h"
#include "ops/geometry.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

// The kept queries of one image: those with a score above 0.
struct ImageQueries {
  std::vector<Plane> planes;
  std::vector<float> scores;
  std::vector<int32_t> queries, nans;

  KeptQueries view() const {
    return {static_cast<int64_t>(planes.size()), planes.data(), scores.data(), queries.data(), nans.data()};
  }
};

std::tuple<Tensor, Tensor, Tensor> panoptic_winners(Tensor scores, Tensor mask_logits, bool resize_probabilities,
                                                    bool clip_to_mask, double mask_threshold, Sizes grid,
                                                    OptionalSizes padded_size, OptionalSizes valid_size, Sizes size,
                                                    int64_t in_top, int64_t out_top, int64_t out_rows) {
  const QueryPlanes planes(mask_logits);
  const int64_t batch = planes.batch(), queries = planes.queries();
  const Geometry geometry(planes.rows(), planes.w(), grid, padded_size, valid_size, size, in_top, out_top, out_rows);
  scores = torch::stable::contiguous(scores);
  check_tensor(scores.dim() == 2 && scores.scalar_type() == ScalarType::Float && scores.size(0) == batch &&
                   scores.size(1) == queries,
               scores, "scores", "(B, N) float32 for the B and N of mask_logits");
  STD_TORCH_CHECK(mask_threshold >= 0 && mask_threshold <= 1, "mask_threshold must lie in 0..1, got ", mask_threshold);
  STD_TORCH_CHECK(queries < (1 << 30), "mask_logits must have less than 2^30 queries");
  const int64_t width = geometry.width();
  STD_TORCH_CHECK(out_rows * width <= INT32_MAX, "out_rows x W must be less than 2^31 pixels");

  Tensor winner = empty_result(scores, {batch, out_rows, width}, ScalarType::Int);
  Tensor areas = zero_result(scores, {batch, queries, 3}, ScalarType::Int);
  Tensor nan_logits = zero_result(scores, {batch, queries}, ScalarType::Int);
  const float* score_data = data_of<const float>(scores);
  int32_t* winner_data = data_of<int32_t>(winner);
  int32_t* area_data = data_of<int32_t>(areas);
  int32_t* nan_data = data_of<int32_t>(nan_logits);

  const auto nan_kernel = FASTMASK_SELECT(count_nan);
  parallel_for(0, batch * queries, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!(score_data[i] > 0)) continue;
      nan_data[i] = static_cast<int32_t>(nan_kernel(planes.plane(i / queries, i % queries)));
    }
  });

  std::vector<ImageQueries> images(batch);
  int64_t most_kept = 0;
  for (int64_t i = 0; i < batch * queries; ++i) {
    if (!(score_data[i] > 0)) continue;
    ImageQueries& image = images[i / queries];
    image.planes.push_back(planes.plane(i / queries, i % queries));
    image.scores.push_back(score_data[i]);
    image.queries.push_back(static_cast<int32_t>(i % queries));
    image.nans.push_back(nan_data[i]);
    most_kept = std::max(most_kept, static_cast<int64_t>(image.planes.size()));
  }

  const TilePlans plans = tile_plans(geometry, resize_probabilities);
  const PanopticRule rule{clip_to_mask, static_cast<float>(mask_threshold),
                          static_cast<float>(std::log(mask_threshold / (1.0 - mask_threshold)))};
  const auto band_kernel = FASTMASK_SELECT(panoptic_band);
  parallel_for(0, batch * plans.bands(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<PanopticWorkspace>(plans, most_kept, planes.w());
    std::vector<PanopticAreas> tile_areas;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / plans.bands(), band = i % plans.bands();
      const ImageQueries& image = images[b];
      tile_areas.assign(image.planes.size(), {});
      const std::vector<TilePlan> tiles = plans.band(band);
      int32_t* out = winner_data + (b * out_rows + tiles[0].rows.begin) * width;
      band_kernel(image.view(), tiles.data(), plans.columns(), rule, work, out, width, tile_areas.data());
      // Integer sums are the same in any order.
      for (size_t k = 0; k < tile_areas.size(); ++k) {
        int32_t* sums = area_data + 3 * (b * queries + image.queries[k]);
        const int64_t terms[3] = {tile_areas[k].won, tile_areas[k].mask, tile_areas[k].visible};
        for (int t = 0; t < 3; ++t) {
          std::atomic_ref<int32_t>(sums[t]).fetch_add(static_cast<int32_t>(terms[t]), std::memory_order_relaxed);
        }
      }
    }
  });
  return {winner, areas, nan_logits};
}

Tensor relabel_winners(Tensor winner, Tensor table) {
  winner = torch::stable::contiguous(winner);
  check_tensor(winner.dim() == 3 && winner.scalar_type() == ScalarType::Int, winner, "winner", "(B, H, W) int32");
  table = torch::stable::contiguous(table);
  check_tensor(table.dim() == 2 && table.scalar_type() == ScalarType::Int && table.size(0) == winner.size(0) &&
                   table.size(1) >= 1,
               table, "table", "(B, 1 + N) int32 for the B of winner");
  const int64_t rows = winner.size(1), width = winner.size(2), entries = table.size(1);
  const auto last = static_cast<uint32_t>(std::min<int64_t>(entries - 1, INT32_MAX));
  Tensor labels = empty_result(winner, {winner.size(0), rows, width}, ScalarType::Int);
  const auto* pixels = data_of<const int32_t>(winner);
  int32_t* out = data_of<int32_t>(labels);
  parallel_for(0, winner.size(0) * rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* ids = data_of<const int32_t>(table) + row / rows * entries;
      for (int64_t x = row * width; x < (row + 1) * width; ++x) {
        out[x] = ids[std::min(static_cast<uint32_t>(pixels[x]) + 1, last)];
      }
    }
  });
  return labels;
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("panoptic_winners", TORCH_BOX(&fastmask::panoptic_winners));
  library.impl("relabel_winners", TORCH_BOX(&fastmask::relabel_winners));
}
