// Matched pairs: mask logits, targets and the query of each target.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "common/points.h"
#include "cpu/mask_loss.h"
#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {

// Checks assignment (L, B, M) int64 against the layers, images and queries of `logits`.
inline Tensor checked_assignment(const Tensor& assignment, const MaskLogits& logits, int64_t max_targets) {
  const Tensor checked = torch::stable::contiguous(assignment);
  check_tensor(checked.dim() == 3 && checked.scalar_type() == ScalarType::Long && checked.size(0) == logits.layers() &&
                   checked.size(1) == logits.batch() && checked.size(2) == max_targets,
               checked, "assignment", "(L, B, M) int64 for the L and B of mask_logits and the M of labels");
  const int64_t* queries = data_of<const int64_t>(checked);
  for (int64_t i = 0; i < checked.numel(); ++i) {
    STD_TORCH_CHECK(queries[i] < logits.queries(), "assignment holds ", queries[i], "; expected less than ",
                    logits.queries());
  }
  return checked;
}

// Kernels that look up points use 32-bit byte offsets.
constexpr int64_t kMostPointPixels = int64_t{1} << 29;

inline void check_point_pixels(const MaskLogits& logits) {
  STD_TORCH_CHECK(bordered_size(logits.h(), logits.w()) < kMostPointPixels, "mask_logits must have less than ",
                  kMostPointPixels, " pixels with a border, got ", logits.h(), " x ", logits.w());
}

struct MatchedPair {
  int64_t index;  // (l * B + b) * M + m
  Plane plane;    // of the query
  ImageTargets targets;
  int64_t target;  // m
};

struct MatchedPairs {
  MaskLogits logits;
  BatchTargets targets;
  MaskTerm term;
  Tensor assignment;

  int64_t count() const { return logits.layers() * logits.batch() * targets.max_targets(); }
  const int64_t* queries() const { return data_of<const int64_t>(assignment); }

  // Nothing for padding, and for a target without a query.
  std::optional<MatchedPair> pair(int64_t i) const {
    const int64_t layer_image = i / targets.max_targets(), m = i % targets.max_targets();
    const ImageTargets of_image = targets.image(layer_image % logits.batch());
    if (queries()[i] < 0 || m >= of_image.count) return std::nullopt;
    return MatchedPair{i, logits.plane(layer_image * logits.queries() + queries()[i]), of_image, m};
  }
};

// The gradients of both losses of each pair.
class PairGradients {
 public:
  PairGradients(const Tensor& grad_mask, const Tensor& grad_dice, int64_t pairs)
      : mask_(torch::stable::contiguous(grad_mask)), dice_(torch::stable::contiguous(grad_dice)) {
    const auto check = [pairs](const Tensor& tensor, const char* name) {
      check_tensor(tensor.scalar_type() == ScalarType::Float && tensor.numel() == pairs, tensor, name,
                   "float32 for the pairs of assignment");
    };
    check(mask_, "grad_mask");
    check(dice_, "grad_dice");
  }

  float mask(int64_t i) const { return data_of<const float>(mask_)[i]; }
  float dice(int64_t i) const { return data_of<const float>(dice_)[i]; }

 private:
  Tensor mask_, dice_;
};

// Memory for the gradient: contiguous planes, with layers, images and queries in the same order as those of the logits,
// so that the model's backward needs no copy. Logits may overlap in memory; the gradient does not. kernels/_layout.py
// uses the same layout.
inline Tensor empty_gradient(const MaskLogits& logits) {
  const Tensor& like = logits.tensor();
  int64_t sizes[5], strides[5] = {0, 0, 0, logits.w(), 1}, step = logits.h() * logits.w();
  for (int d = 0; d < 5; ++d) sizes[d] = like.size(d);
  int order[3] = {2, 1, 0};
  std::stable_sort(order, order + 3, [&](int a, int b) { return like.stride(a) < like.stride(b); });
  for (const int d : order) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(5, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
                      AOTI_TORCH_SUCCESS,
                  "cannot make the gradient of mask_logits: not enough memory");
  Tensor grad(handle);
  advise_huge_pages(grad.data_ptr(), grad.numel() * static_cast<int64_t>(grad.element_size()));
  return grad;
}

}  // namespace fastmask
