#include "cpu/mask_cost.h"

#include "common/scratch.h"
#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

Tensor mask_cost(Tensor class_logits, Tensor mask_logits, Tensor labels, std::optional<Tensor> masks,
                 std::optional<Tensor> segments, std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                 double cost_class, double cost_mask, double cost_dice, std::string term_name, double alpha,
                 double gamma) {
  class_logits = torch::stable::contiguous(class_logits);
  const MaskLogits logits(mask_logits);
  STD_TORCH_CHECK(class_logits.dim() == 4 && class_logits.size(3) > 0, "class_logits must be (L, B, N, K+1)");
  const int64_t batch = logits.batch(), queries = logits.queries(), classes = class_logits.size(3);
  STD_TORCH_CHECK(
      class_logits.size(0) == logits.layers() && class_logits.size(1) == batch && class_logits.size(2) == queries,
      "class_logits and mask_logits differ in layers, images or queries");
  const Dtype class_dtype = logit_dtype(class_logits, "class_logits");
  const Dtype mask_dtype = logit_dtype(mask_logits, "mask_logits");
  const MaskTerm term = mask_term(term_name, alpha, gamma);
  const MaskCostWeights weights{static_cast<float>(cost_class), static_cast<float>(cost_mask),
                                static_cast<float>(cost_dice)};
  const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void);
  STD_TORCH_CHECK(targets.batch() == batch, "labels has ", targets.batch(), " images, mask_logits ", batch);
  const int64_t max_targets = targets.max_targets();

  for (int64_t i = 0; i < batch * max_targets; ++i) {
    STD_TORCH_CHECK(targets.labels(0)[i] < classes, "labels holds ", targets.labels(0)[i], "; expected less than ",
                    classes);
  }
  std::vector<Coverage> coverage(batch);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) coverage[b] = make_coverage(targets.image(b), logits.h(), logits.w());
  });

  Tensor cost = empty_result(mask_logits, {logits.layers(), batch, queries, max_targets}, ScalarType::Float);
  float* cost_data = static_cast<float*>(cost.data_ptr());
  const void* class_data = class_logits.data_ptr();
  const int64_t pixels = logits.h() * logits.w();
  const auto row_kernel = FASTMASK_SELECT(mask_cost_row);
  parallel_for(0, logits.rows(), 1, [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(mask_cost_scratch(max_targets));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / queries % batch;
      float* row_cost = cost_data + row * max_targets;
      const CoverageView view = coverage[b].view();
      row_kernel(class_data, row * classes, classes, class_dtype, logits.data(), logits.offset(row), pixels, mask_dtype,
                 targets.labels(b), view, term, weights, scratch.data(), row_cost);
      for (int64_t m = view.targets; m < max_targets; ++m) row_cost[m] = 0.0f;
    }
  });
  return cost;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) { library.impl("mask_cost", TORCH_BOX(&fastmask::mask_cost)); }
