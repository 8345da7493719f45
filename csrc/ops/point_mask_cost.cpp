#include "cpu/point_mask_cost.h"

#include <algorithm>

#include "common/scratch.h"
#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

Tensor point_mask_cost(Tensor class_logits, Tensor mask_logits, Tensor labels, std::optional<Tensor> masks,
                       std::optional<Tensor> segments, std::optional<Tensor> valid, int64_t void_value,
                       bool ignore_void, Tensor points, double cost_class, double cost_mask, double cost_dice,
                       std::string term_name, double alpha, double gamma) {
  class_logits = torch::stable::contiguous(class_logits);
  points = torch::stable::contiguous(points);
  const MaskLogits logits(mask_logits);
  STD_TORCH_CHECK(class_logits.dim() == 4 && class_logits.size(3) > 0, "class_logits must be (L, B, N, K+1)");
  const int64_t layers = logits.layers(), batch = logits.batch(), queries = logits.queries();
  const int64_t classes = class_logits.size(3);
  STD_TORCH_CHECK(class_logits.size(0) == layers && class_logits.size(1) == batch && class_logits.size(2) == queries,
                  "class_logits and mask_logits differ in layers, images or queries");
  const Dtype class_dtype = logit_dtype(class_logits, "class_logits");
  const Dtype mask_dtype = logit_dtype(mask_logits, "mask_logits");
  const MaskTerm term = mask_term(term_name, alpha, gamma);
  const MaskCostWeights weights{static_cast<float>(cost_class), static_cast<float>(cost_mask),
                                static_cast<float>(cost_dice)};
  const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void);
  STD_TORCH_CHECK(targets.batch() == batch, "labels has ", targets.batch(), " images, mask_logits ", batch);
  STD_TORCH_CHECK(
      points.dim() == 3 && points.size(0) == batch && points.size(2) == 2 && points.scalar_type() == ScalarType::Float,
      "points must be (B, P, 2) float32 for the B of mask_logits");
  const int64_t max_targets = targets.max_targets(), num_points = points.size(1);

  for (int64_t i = 0; i < batch * max_targets; ++i) {
    STD_TORCH_CHECK(targets.labels(0)[i] < classes, "labels holds ", targets.labels(0)[i], "; expected less than ",
                    classes);
  }
  const float* points_data = static_cast<const float*>(points.data_ptr());
  std::vector<PointSet> sets(batch);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      sets[b] = make_point_set(points_data + b * num_points * 2, num_points, targets.image(b), logits.h(), logits.w());
    }
  });

  Tensor cost = empty_result(mask_logits, {layers, batch, queries, max_targets}, ScalarType::Float);
  float* cost_data = static_cast<float*>(cost.data_ptr());
  const void* class_data = class_logits.data_ptr();
  const int64_t lanes = FASTMASK_SELECT(point_mask_cost_lanes)();
  const auto group_kernel = FASTMASK_SELECT(point_mask_cost_group);
  const int64_t rows = layers * queries, groups = (rows + lanes - 1) / lanes;  // of one image
  parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(point_mask_cost_scratch(max_targets, logits.w()));
    int64_t class_offsets[kPointCostGroup], mask_offsets[kPointCostGroup];
    float* cost_rows[kPointCostGroup];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups, first = i % groups * lanes, count = std::min(lanes, rows - first);
      const PointView view = sets[b].view();
      for (int64_t k = 0; k < count; ++k) {
        const int64_t row = ((first + k) / queries * batch + b) * queries + (first + k) % queries;
        class_offsets[k] = row * classes;
        mask_offsets[k] = logits.offset(row);
        cost_rows[k] = cost_data + row * max_targets;
        for (int64_t m = view.targets; m < max_targets; ++m) cost_rows[k][m] = 0.0f;
      }
      group_kernel(class_data, class_offsets, classes, class_dtype, logits.data(), mask_offsets, logits.h(), logits.w(),
                   mask_dtype, count, targets.labels(b), view, term, weights, scratch.data(), cost_rows);
    }
  });
  return cost;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("point_mask_cost", TORCH_BOX(&fastmask::point_mask_cost));
}
