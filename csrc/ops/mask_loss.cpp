#include "cpu/mask_loss.h"

#include <algorithm>
#include <tuple>

#include "common/scratch.h"
#include "ops/interpolation_table.h"
#include "ops/matched_pairs.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

// Matched pairs, and where each pixel of the targets reads the logits.
struct UpsampledPairs : MatchedPairs {
  InterpolationTable rows, columns;

  template <typename... Arguments>
  explicit UpsampledPairs(const Arguments&... arguments)
      : MatchedPairs(arguments...), rows(logits.h(), targets.height()), columns(logits.w(), targets.width()) {}

  Resampling resampling() const { return {logits.h(), logits.w(), rows.view(), columns.view()}; }
};

std::tuple<Tensor, Tensor, Tensor> mask_loss(Tensor mask_logits, Tensor assignment, Tensor labels,
                                             std::optional<Tensor> masks, std::optional<Tensor> segments,
                                             std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                                             std::string term_name, double alpha, double gamma) {
  const UpsampledPairs pairs(mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void,
                             term_name, alpha, gamma);
  const int64_t max_targets = pairs.targets.max_targets();
  const int64_t layers = pairs.logits.layers(), batch = pairs.logits.batch();
  Tensor pair_mask = zero_result(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor pair_dice = zero_result(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor sums = zero_result(mask_logits, {layers, batch, max_targets, 4}, ScalarType::Float);
  float* mask_data = static_cast<float*>(pair_mask.data_ptr());
  float* dice_data = static_cast<float*>(pair_dice.data_ptr());
  float* sums_data = static_cast<float*>(sums.data_ptr());
  const Resampling resampling = pairs.resampling();
  const auto pair_kernel = FASTMASK_SELECT(mask_loss_pair);
  parallel_for(0, pairs.count(), 1, [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(mask_loss_scratch(pairs.targets.width(), pairs.logits.w()));
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
  const UpsampledPairs pairs(mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void,
                             term_name, alpha, gamma);
  const PairGradients gradients(grad_mask, grad_dice, sums, pairs.count());
  const Tensor grad_logits = zero_gradient(pairs.logits);
  const Resampling resampling = pairs.resampling();
  const auto pair_kernel = FASTMASK_SELECT(mask_loss_pair_backward);
  for_matched_rows(pairs, grad_logits, [&] {
    return [&, scratch = AlignedFloats(mask_loss_backward_scratch(pairs.targets.width(), pairs.logits.w()))](
               const ImageTargets& targets, int64_t row, int64_t i, float* grad) mutable {
      pair_kernel(pairs.logits.data(), pairs.logits.offset(row), pairs.dtype, resampling, targets,
                  i % pairs.targets.max_targets(), pairs.term, gradients.sums(i), gradients.mask(i), gradients.dice(i),
                  scratch.data(), grad);
    };
  });
  return grad_logits;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("mask_loss", TORCH_BOX(&fastmask::mask_loss));
  library.impl("mask_loss_backward", TORCH_BOX(&fastmask::mask_loss_backward));
}
