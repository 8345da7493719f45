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

  Workspace workspace(Scratch& scratch, bool with_slopes) const {
    return scratch.lay_out<Workspace>(logits.h(), logits.w(), targets.width(), table.phases.size, with_slopes);
  }

  MaskLossPair losses(const MatchedPair& pair, const Workspace& work, float* slopes) const {
    return FASTMASK_SELECT(mask_loss_pair)(pair.plane, table.view(), pair.targets, pair.target, term, work, slopes);
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

  Workspace workspace(Scratch& scratch, bool with_slopes) const {
    return scratch.lay_out<Workspace>(logits.h(), logits.w(), num_points, with_slopes);
  }

  MaskLossPair losses(const MatchedPair& pair, const Workspace& work, float* slopes) const {
    return FASTMASK_SELECT(point_mask_loss_pair)(pair.plane, pair.targets, pair.target,
                                                 data_of<const float>(points) + pair.index * num_points * 2, num_points,
                                                 term, work, slopes);
  }
};

using Losses = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // mask, dice, sums, slopes

// `keep_slopes`: also the derivatives of both losses by each pair's logits, (L, B, M, 2, h, w).
template <class Pairs>
Losses losses_of(const Pairs& pairs, bool keep_slopes) {
  const MaskLogits& logits = pairs.logits;
  const std::vector<int64_t> shape{logits.layers(), logits.batch(), pairs.targets.max_targets()};
  const Tensor& like = logits.tensor();
  Tensor mask = zero_result(like, shape, ScalarType::Float), dice = zero_result(like, shape, ScalarType::Float);
  Tensor sums = zero_result(like, {shape[0], shape[1], shape[2], 4}, ScalarType::Float);
  std::vector<int64_t> slopes_shape{0};
  if (keep_slopes) slopes_shape = {shape[0], shape[1], shape[2], 2, logits.h(), logits.w()};
  Tensor slopes = empty_result(like, slopes_shape, ScalarType::Float);
  const int64_t pair_slopes = 2 * logits.h() * logits.w();
  const auto slopes_of = [&](int64_t i) { return keep_slopes ? data_of<float>(slopes) + i * pair_slopes : nullptr; };
  // Threads share the matched pairs alone: the others take no time. The layers of a target follow each other, as they
  // read the same pixels.
  std::vector<int64_t> matched, unmatched;
  const int64_t layer_pairs = pairs.count() / std::max<int64_t>(logits.layers(), 1);
  for (int64_t target = 0; target < layer_pairs; ++target) {
    for (int64_t i = target; i < pairs.count(); i += layer_pairs) {
      (pairs.pair(i).has_value() ? matched : unmatched).push_back(i);
    }
  }
  parallel_for(0, static_cast<int64_t>(matched.size()), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = pairs.workspace(scratch, keep_slopes);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = matched[k];
      const MaskLossPair losses = pairs.losses(*pairs.pair(i), work, slopes_of(i));
      data_of<float>(mask)[i] = losses.mask;
      data_of<float>(dice)[i] = losses.dice;
      memcpy(data_of<float>(sums) + 4 * i, &losses.sums, sizeof losses.sums);
    }
  });
  if (keep_slopes) {
    parallel_for(0, static_cast<int64_t>(unmatched.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) std::fill_n(slopes_of(unmatched[k]), pair_slopes, 0.0f);
    });
  }
  return {mask, dice, sums, slopes};
}

// One thread computes the gradient of a query's logits, for all targets matched to it. Slopes that forward did not keep
// are computed again.
template <class Pairs>
Tensor gradient_of(const Pairs& pairs, const PairGradients& gradients, const Tensor& slopes) {
  const Tensor grad_logits = empty_gradient(pairs.logits);
  const MaskLogits grad_rows(grad_logits);
  const int64_t pixels = pairs.logits.h() * pairs.logits.w(), max_targets = pairs.targets.max_targets();
  const int64_t element = static_cast<int64_t>(grad_logits.element_size());
  const bool kept = slopes.numel() > 0;
  check_tensor(!kept || (slopes.scalar_type() == ScalarType::Float && slopes.is_contiguous() &&
                         slopes.numel() == pairs.count() * 2 * pixels),
               slopes, "slopes", "forward's, or empty");
  const int64_t* const queries = pairs.queries();
  parallel_for(0, pairs.logits.rows(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = pairs.workspace(scratch, !kept);
    std::vector<float> grad(pixels), again(kept ? 0 : 2 * pixels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first_pair = row / pairs.logits.queries() * max_targets;
      bool matched = false;
      for (int64_t i = first_pair; i < first_pair + max_targets; ++i) {
        if (queries[i] != row % pairs.logits.queries()) continue;
        const std::optional<MatchedPair> pair = pairs.pair(i);
        if (!pair.has_value()) continue;
        if (!matched) std::fill(grad.begin(), grad.end(), 0.0f);
        matched = true;
        const float* pair_slopes = kept ? data_of<const float>(slopes) + 2 * pixels * i : again.data();
        if (!kept) pairs.losses(*pair, work, again.data());
        FASTMASK_SELECT(add_slopes)(pair_slopes, pixels, gradients.mask(i), gradients.dice(i), grad.data());
      }
      if (!matched) {
        memset(static_cast<char*>(grad_logits.data_ptr()) + grad_rows.plane(row).logits.offset * element, 0,
               pixels * element);
        continue;
      }
      FASTMASK_SELECT(store_row)
      (grad.data(), pixels, grad_logits.data_ptr(), pairs.logits.dtype(), grad_rows.plane(row).logits.offset);
    }
  });
  return grad_logits;
}

// Registers an operator and its gradient. Points is a tensor type, or nothing.
template <class Pairs, class... Points>
struct MaskLossOperator {
  static Losses forward(Tensor mask_logits, Tensor assignment, Tensor labels, std::optional<Tensor> masks,
                        std::optional<Tensor> segments, std::optional<Tensor> valid, int64_t void_value,
                        bool ignore_void, Points... points, std::string term_name, double alpha, double gamma,
                        bool keep_slopes) {
    const MaskLogits logits(mask_logits);
    const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void, logits);
    return losses_of(Pairs({logits, targets, mask_term(term_name, alpha, gamma),
                            checked_assignment(assignment, logits, targets.max_targets())},
                           points...),
                     keep_slopes);
  }

  static Tensor backward(Tensor grad_mask, Tensor grad_dice, Tensor /*sums*/, Tensor slopes, Tensor mask_logits,
                         Tensor assignment, Tensor labels, std::optional<Tensor> masks, std::optional<Tensor> segments,
                         std::optional<Tensor> valid, int64_t void_value, bool ignore_void, Points... points,
                         std::string term_name, double alpha, double gamma) {
    const MaskLogits logits(mask_logits);
    const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void, logits);
    const Pairs pairs({logits, targets, mask_term(term_name, alpha, gamma),
                       checked_assignment(assignment, logits, targets.max_targets())},
                      points...);
    return gradient_of(pairs, PairGradients(grad_mask, grad_dice, pairs.count()), slopes);
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
