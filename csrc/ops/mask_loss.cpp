#include "cpu/mask_loss.h"

#include <algorithm>
#include <tuple>

#include "ops/interpolation.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

using torch::stable::parallel_for;

// What forward and backward check and prepare alike.
struct MatchedPairs {
  MaskLogits logits;
  Tensor assignment;
  Dtype dtype;
  MaskTerm term;
  BatchTargets targets;
  InterpolationTable rows, columns;

  MatchedPairs(const Tensor& mask_logits, const Tensor& assignment_in, const Tensor& labels,
               const std::optional<Tensor>& masks, const std::optional<Tensor>& segments,
               const std::optional<Tensor>& valid, int64_t void_value, bool ignore_void, const std::string& term_name,
               double alpha, double gamma)
      : logits(mask_logits),
        assignment(torch::stable::contiguous(assignment_in)),
        dtype(logit_dtype(mask_logits, "mask_logits")),
        term(mask_term(term_name, alpha, gamma)),
        targets(labels, masks, segments, valid, void_value, ignore_void),
        rows(logits.h(), targets.height()),
        columns(logits.w(), targets.width()) {
    STD_TORCH_CHECK(targets.batch() == logits.batch(), "labels has ", targets.batch(), " images, mask_logits ",
                    logits.batch());
    STD_TORCH_CHECK(assignment.dim() == 3 && assignment.scalar_type() == ScalarType::Long &&
                        assignment.size(0) == logits.layers() && assignment.size(1) == logits.batch() &&
                        assignment.size(2) == targets.max_targets(),
                    "assignment must be (L, B, M) int64 for the L and B of mask_logits and the M of labels");
    for (int64_t i = 0; i < count(); ++i) {
      STD_TORCH_CHECK(queries()[i] < logits.queries(), "assignment holds ", queries()[i], "; expected less than ",
                      logits.queries());
    }
  }

  int64_t count() const { return logits.layers() * logits.batch() * targets.max_targets(); }
  const int64_t* queries() const { return static_cast<const int64_t*>(assignment.data_ptr()); }
  Resampling resampling() const { return {logits.h(), logits.w(), rows.view(), columns.view()}; }
};

std::tuple<Tensor, Tensor, Tensor> mask_loss(Tensor mask_logits, Tensor assignment, Tensor labels,
                                             std::optional<Tensor> masks, std::optional<Tensor> segments,
                                             std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                                             std::string term_name, double alpha, double gamma) {
  const MatchedPairs pairs(mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void, term_name,
                           alpha, gamma);
  const int64_t max_targets = pairs.targets.max_targets();
  const int64_t layers = pairs.logits.layers(), batch = pairs.logits.batch();
  Tensor pair_mask = torch::stable::new_zeros(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor pair_dice = torch::stable::new_zeros(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor sums = torch::stable::new_zeros(mask_logits, {layers, batch, max_targets, 4}, ScalarType::Float);
  float* mask_data = static_cast<float*>(pair_mask.data_ptr());
  float* dice_data = static_cast<float*>(pair_dice.data_ptr());
  float* sums_data = static_cast<float*>(sums.data_ptr());
  const Resampling resampling = pairs.resampling();
  const auto pair_kernel = FASTMASK_SELECT(mask_loss_pair);
  parallel_for(0, pairs.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(mask_loss_scratch(pairs.targets.width(), pairs.logits.w()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t query = pairs.queries()[i], layer_image = i / max_targets, m = i % max_targets;
      const ImageTargets targets = pairs.targets.image(layer_image % batch);
      if (query < 0 || m >= targets.count) continue;
      const int64_t offset = pairs.logits.offset(layer_image * pairs.logits.queries() + query);
      const MaskLossPair pair =
          pair_kernel(pairs.logits.data(), offset, pairs.dtype, resampling, targets, m, pairs.term, scratch.data());
      mask_data[i] = pair.mask;
      dice_data[i] = pair.dice;
      memcpy(sums_data + 4 * i, &pair.sums, sizeof pair.sums);
    }
  });
  return {pair_mask, pair_dice, sums};
}

Tensor mask_loss_backward(Tensor grad_mask, Tensor grad_dice, Tensor sums, Tensor mask_logits, Tensor assignment,
                          Tensor labels, std::optional<Tensor> masks, std::optional<Tensor> segments,
                          std::optional<Tensor> valid, int64_t void_value, bool ignore_void, std::string term_name,
                          double alpha, double gamma) {
  const MatchedPairs pairs(mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void, term_name,
                           alpha, gamma);
  const int64_t max_targets = pairs.targets.max_targets();
  grad_mask = torch::stable::contiguous(grad_mask);
  grad_dice = torch::stable::contiguous(grad_dice);
  sums = torch::stable::contiguous(sums);
  STD_TORCH_CHECK(grad_mask.scalar_type() == ScalarType::Float && grad_mask.numel() == pairs.count() &&
                      grad_dice.scalar_type() == ScalarType::Float && grad_dice.numel() == pairs.count() &&
                      sums.scalar_type() == ScalarType::Float && sums.numel() == 4 * pairs.count(),
                  "grad_mask, grad_dice and sums must be float32 for the pairs of assignment");
  const float* grad_mask_data = static_cast<const float*>(grad_mask.data_ptr());
  const float* grad_dice_data = static_cast<const float*>(grad_dice.data_ptr());
  const float* sums_data = static_cast<const float*>(sums.data_ptr());
  // Laid out like the logits, so that the gradient goes on through the model without a copy.
  Tensor grad_logits = torch::stable::empty_like(pairs.logits.tensor());
  torch::stable::zero_(grad_logits);
  const MaskLogits grad_rows(grad_logits);
  void* grad_data = grad_logits.data_ptr();
  const Resampling resampling = pairs.resampling();
  const int64_t queries = pairs.logits.queries(), pixels = pairs.logits.h() * pairs.logits.w();
  const auto pair_kernel = FASTMASK_SELECT(mask_loss_pair_backward);
  const auto store_kernel = FASTMASK_SELECT(store_row);
  // A query's row is written by one thread, whichever targets it was matched to.
  parallel_for(0, pairs.logits.rows(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(mask_loss_backward_scratch(pairs.targets.width(), pairs.logits.w()));
    std::vector<float> grad(pixels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t layer_image = row / queries;
      const ImageTargets targets = pairs.targets.image(layer_image % pairs.logits.batch());
      bool matched = false;
      for (int64_t m = 0; m < targets.count; ++m) {
        const int64_t i = layer_image * max_targets + m;
        if (pairs.queries()[i] != row % queries) continue;
        if (!matched) std::fill(grad.begin(), grad.end(), 0.0f);
        matched = true;
        MaskLossSums pair_sums;
        memcpy(&pair_sums, sums_data + 4 * i, sizeof pair_sums);
        pair_kernel(pairs.logits.data(), pairs.logits.offset(row), pairs.dtype, resampling, targets, m, pairs.term,
                    pair_sums, grad_mask_data[i], grad_dice_data[i], scratch.data(), grad.data());
      }
      if (matched) store_kernel(grad.data(), pixels, grad_data, pairs.dtype, grad_rows.offset(row));
    }
  });
  return grad_logits;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("mask_loss", TORCH_BOX(&fastmask::mask_loss));
  library.impl("mask_loss_backward", TORCH_BOX(&fastmask::mask_loss_backward));
}
