#include "cpu/point_mask_loss.h"

#include <algorithm>
#include <tuple>

#include "common/scratch.h"
#include "ops/matched_pairs.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

struct PointPairs : MatchedPairs {
  Tensor points;
  int64_t num_points;

  template <typename... Arguments>
  explicit PointPairs(const Tensor& points_in, const Arguments&... arguments)
      : MatchedPairs(arguments...), points(torch::stable::contiguous(points_in)) {
    STD_TORCH_CHECK(points.dim() == 5 && points.size(0) == logits.layers() && points.size(1) == logits.batch() &&
                        points.size(2) == targets.max_targets() && points.size(4) == 2 &&
                        points.scalar_type() == ScalarType::Float,
                    "points must be (L, B, M, P, 2) float32 for the L and B of mask_logits and the M of labels");
    num_points = points.size(3);
    constexpr int64_t kMost = int64_t{1} << 29;  // 32-bit byte offsets
    STD_TORCH_CHECK(targets.height() * targets.width() < kMost && bordered_size(logits.h(), logits.w()) < kMost,
                    "maps of ", kMost, " pixels or more are not supported");
  }

  const float* of_pair(int64_t i) const { return static_cast<const float*>(points.data_ptr()) + i * num_points * 2; }
};

std::tuple<Tensor, Tensor, Tensor> point_mask_loss(Tensor mask_logits, Tensor assignment, Tensor labels,
                                                   std::optional<Tensor> masks, std::optional<Tensor> segments,
                                                   std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                                                   Tensor points, std::string term_name, double alpha, double gamma) {
  const PointPairs pairs(points, mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void,
                         term_name, alpha, gamma);
  const MaskLogits& logits = pairs.logits;
  const int64_t max_targets = pairs.targets.max_targets();
  const int64_t layers = logits.layers(), batch = logits.batch();
  Tensor pair_mask = zero_result(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor pair_dice = zero_result(mask_logits, {layers, batch, max_targets}, ScalarType::Float);
  Tensor sums = zero_result(mask_logits, {layers, batch, max_targets, 4}, ScalarType::Float);
  float* mask_data = static_cast<float*>(pair_mask.data_ptr());
  float* dice_data = static_cast<float*>(pair_dice.data_ptr());
  float* sums_data = static_cast<float*>(sums.data_ptr());
  const auto pair_kernel = FASTMASK_SELECT(point_mask_loss_pair);
  parallel_for(0, pairs.count(), 1, [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(point_mask_loss_scratch(logits.h(), logits.w()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t query = pairs.queries()[i], layer_image = i / max_targets, m = i % max_targets;
      const ImageTargets targets = pairs.targets.image(layer_image % batch);
      if (query < 0 || m >= targets.count) continue;
      const int64_t offset = logits.offset(layer_image * logits.queries() + query);
      const MaskLossPair pair = pair_kernel(logits.data(), offset, pairs.dtype, logits.h(), logits.w(), targets, m,
                                            pairs.of_pair(i), pairs.num_points, pairs.term, scratch.data());
      mask_data[i] = pair.mask;
      dice_data[i] = pair.dice;
      memcpy(sums_data + 4 * i, &pair.sums, sizeof pair.sums);
    }
  });
  return {pair_mask, pair_dice, sums};
}

Tensor point_mask_loss_backward(Tensor grad_mask, Tensor grad_dice, Tensor sums, Tensor mask_logits, Tensor assignment,
                                Tensor labels, std::optional<Tensor> masks, std::optional<Tensor> segments,
                                std::optional<Tensor> valid, int64_t void_value, bool ignore_void, Tensor points,
                                std::string term_name, double alpha, double gamma) {
  const PointPairs pairs(points, mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void,
                         term_name, alpha, gamma);
  const MaskLogits& logits = pairs.logits;
  const PairGradients gradients(grad_mask, grad_dice, sums, pairs.count());
  const Tensor grad_logits = zero_gradient(logits);
  const auto pair_kernel = FASTMASK_SELECT(point_mask_loss_pair_backward);
  for_matched_rows(pairs, grad_logits, [&] {
    return [&, scratch = AlignedFloats(point_mask_loss_scratch(logits.h(), logits.w()))](
               const ImageTargets& targets, int64_t row, int64_t i, float* grad) mutable {
      pair_kernel(logits.data(), logits.offset(row), pairs.dtype, logits.h(), logits.w(), targets,
                  i % pairs.targets.max_targets(), pairs.of_pair(i), pairs.num_points, pairs.term, gradients.sums(i),
                  gradients.mask(i), gradients.dice(i), scratch.data(), grad);
    };
  });
  return grad_logits;
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("point_mask_loss", TORCH_BOX(&fastmask::point_mask_loss));
  library.impl("point_mask_loss_backward", TORCH_BOX(&fastmask::point_mask_loss_backward));
}
