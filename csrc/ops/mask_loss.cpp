// fastmask::mask_loss, at all pixels of the targets, and fastmask::point_mask_loss, at points; and their gradients.
#include "cpu/mask_loss.h"

#include <tuple>

#include "cpu/point_mask_loss.h"
#include "ops/matched_pairs.h"

namespace fastmask {
namespace {

// Pairs compared at all pixels of the targets.
struct PixelPairs : MatchedPairs {
  using Workspace = MaskLossWorkspace;
  ResamplingTable table;

  explicit PixelPairs(const MatchedPairs& pairs)
      : MatchedPairs(pairs), table(logits.h(), logits.w(), targets.height(), targets.width()) {}

  Workspace workspace(Scratch& scratch) const { return scratch.lay_out<Workspace>(logits.w(), targets.width()); }

  MaskLossPair losses(const MatchedPair& pair, const Workspace& work) const {
    return FASTMASK_SELECT(mask_loss_pair)(pair.plane, table.view(), pair.targets, pair.target, term, work);
  }

  void add_gradient(const MatchedPair& pair, const MaskLossGradient& given, const Workspace& work, float* grad) const {
    FASTMASK_SELECT(mask_loss_pair_backward)
    (pair.plane, table.view(), pair.targets, pair.target, term, given, work, grad);
  }
};

// Pairs compared at each pair's points.
struct PointPairs : MatchedPairs {
  using Workspace = PointMaskLossWorkspace;
  Tensor points;
  int64_t num_points;

  PointPairs(const MatchedPairs& pairs, const Tensor& points_in)
      : MatchedPairs(pairs), points(torch::stable::contiguous(points_in)) {
    check_tensor(points.dim() == 5 && points.size(0) == logits.layers() && points.size(1) == logits.batch() &&
                     points.size(2) == targets.max_targets() && points.size(4) == 2 &&
                     points.scalar_type() == ScalarType::Float,
                 points, "points", "(L, B, M, P, 2) float32 for the L and B of mask_logits and the M of labels");
    num_points = points.size(3);
    STD_TORCH_CHECK(targets.height() * targets.width() < kMostPointPixels, "targets must have less than ",
                    kMostPointPixels, " pixels, got ", targets.height(), " x ", targets.width());
    check_point_pixels(logits);
  }

  Workspace workspace(Scratch& scratch) const { return scratch.lay_out<Workspace>(logits.h(), logits.w()); }

  const float* points_of(const MatchedPair& pair) const {
    return data_of<const float>(points) + pair.index * num_points * 2;
  }

  MaskLossPair losses(const MatchedPair& pair, const Workspace& work) const {
    return FASTMASK_SELECT(point_mask_loss_pair)(pair.plane, pair.targets, pair.target, points_of(pair), num_points,
                                                 term, work);
  }

  void add_gradient(const MatchedPair& pair, const MaskLossGradient& given, const Workspace& work, float* grad) const {
    FASTMASK_SELECT(point_mask_loss_pair_backward)
    (pair.plane, pair.targets, pair.target, points_of(pair), num_points, term, given, work, grad);
  }
};

template <class Pairs>
std::tuple<Tensor, Tensor, Tensor> losses_of(const Pairs& pairs) {
  const std::vector<int64_t> shape{pairs.logits.layers(), pairs.logits.batch(), pairs.targets.max_targets()};
  const Tensor& like = pairs.logits.tensor();
  Tensor mask = zero_result(like, shape, ScalarType::Float), dice = zero_result(like, shape, ScalarType::Float);
  Tensor sums = zero_result(like, {shape[0], shape[1], shape[2], 4}, ScalarType::Float);
  parallel_for(0, pairs.count(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = pairs.workspace(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const std::optional<MatchedPair> pair = pairs.pair(i);
      if (!pair.has_value()) continue;
      const MaskLossPair losses = pairs.losses(*pair, work);
      data_of<float>(mask)[i] = losses.mask;
      data_of<float>(dice)[i] = losses.dice;
      memcpy(data_of<float>(sums) + 4 * i, &losses.sums, sizeof losses.sums);
    }
  });
  return {mask, dice, sums};
}

// One thread computes the gradient of a query's logits, for all targets matched to it.
template <class Pairs>
Tensor gradient_of(const Pairs& pairs, const PairGradients& gradients) {
  const Tensor grad_logits = zero_gradient(pairs.logits);
  const MaskLogits grad_rows(grad_logits);
  const int64_t pixels = pairs.logits.h() * pairs.logits.w(), max_targets = pairs.targets.max_targets();
  const int64_t* const queries = pairs.queries();
  parallel_for(0, pairs.logits.rows(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = pairs.workspace(scratch);
    std::vector<float> grad(pixels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first_pair = row / pairs.logits.queries() * max_targets;
      bool matched = false;
      for (int64_t i = first_pair; i < first_pair + max_targets; ++i) {
        if (queries[i] != row % pairs.logits.queries()) continue;
        const std::optional<MatchedPair> pair = pairs.pair(i);
        if (!pair.has_value()) continue;
        if (!matched) std::fill(grad.begin(), grad.end(), 0.0f);
        matched = true;
        pairs.add_gradient(*pair, gradients[i], work, grad.data());
      }
      if (!matched) continue;
      FASTMASK_SELECT(store_row)
      (grad.data(), pixels, grad_logits.data_ptr(), pairs.logits.dtype(), grad_rows.plane(row).logits.offset);
    }
  });
  return grad_logits;
}

// Registers an operator and its gradient. Points is a tensor type, or nothing.
template <class Pairs, class... Points>
struct MaskLossOperator {
  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor mask_logits, Tensor assignment, Tensor labels,
                                                    std::optional<Tensor> masks, std::optional<Tensor> segments,
                                                    std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                                                    Points... points, std::string term_name, double alpha,
                                                    double gamma) {
    const MaskLogits logits(mask_logits);
    const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void, logits);
    return losses_of(Pairs({logits, targets, mask_term(term_name, alpha, gamma),
                            checked_assignment(assignment, logits, targets.max_targets())},
                           points...));
  }

  static Tensor backward(Tensor grad_mask, Tensor grad_dice, Tensor sums, Tensor mask_logits, Tensor assignment,
                         Tensor labels, std::optional<Tensor> masks, std::optional<Tensor> segments,
                         std::optional<Tensor> valid, int64_t void_value, bool ignore_void, Points... points,
                         std::string term_name, double alpha, double gamma) {
    const MaskLogits logits(mask_logits);
    const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void, logits);
    const Pairs pairs({logits, targets, mask_term(term_name, alpha, gamma),
                       checked_assignment(assignment, logits, targets.max_targets())},
                      points...);
    return gradient_of(pairs, PairGradients(grad_mask, grad_dice, sums, pairs.count()));
  }
};

using MaskLoss = MaskLossOperator<PixelPairs>;
using PointMaskLoss = MaskLossOperator<PointPairs, Tensor>;

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("mask_loss", TORCH_BOX(&fastmask::MaskLoss::forward));
  library.impl("mask_loss_backward", TORCH_BOX(&fastmask::MaskLoss::backward));
  library.impl("point_mask_loss", TORCH_BOX(&fastmask::PointMaskLoss::forward));
  library.impl("point_mask_loss_backward", TORCH_BOX(&fastmask::PointMaskLoss::backward));
}
