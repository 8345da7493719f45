// Mask logits, targets and the query of each target, as the losses of matched pairs take them.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "cpu/mask_loss.h"
#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {

// assignment (L, B, M) int64 for the layers, images and queries of `logits`; indices beyond the queries are refused.
inline Tensor checked_assignment(const Tensor& assignment, const MaskLogits& logits, int64_t max_targets) {
  const Tensor checked = torch::stable::contiguous(assignment);
  STD_TORCH_CHECK(checked.dim() == 3 && checked.scalar_type() == ScalarType::Long &&
                      checked.size(0) == logits.layers() && checked.size(1) == logits.batch() &&
                      checked.size(2) == max_targets,
                  "assignment must be (L, B, M) int64 for the L and B of mask_logits and the M of labels");
  const int64_t* queries = static_cast<const int64_t*>(checked.data_ptr());
  for (int64_t i = 0; i < checked.numel(); ++i) {
    STD_TORCH_CHECK(queries[i] < logits.queries(), "assignment holds ", queries[i], "; expected less than ",
                    logits.queries());
  }
  return checked;
}

struct MatchedPairs {
  MaskLogits logits;
  Dtype dtype;
  MaskTerm term;
  BatchTargets targets;
  Tensor assignment;

  MatchedPairs(const Tensor& mask_logits, const Tensor& assignment_in, const Tensor& labels,
               const std::optional<Tensor>& masks, const std::optional<Tensor>& segments,
               const std::optional<Tensor>& valid, int64_t void_value, bool ignore_void, const std::string& term_name,
               double alpha, double gamma)
      : logits(mask_logits),
        dtype(logit_dtype(mask_logits, "mask_logits")),
        term(mask_term(term_name, alpha, gamma)),
        targets(labels, masks, segments, valid, void_value, ignore_void),
        assignment(checked_assignment(assignment_in, logits, targets.max_targets())) {
    STD_TORCH_CHECK(targets.batch() == logits.batch(), "labels has ", targets.batch(), " images, mask_logits ",
                    logits.batch());
  }

  int64_t count() const { return logits.layers() * logits.batch() * targets.max_targets(); }
  const int64_t* queries() const { return static_cast<const int64_t*>(assignment.data_ptr()); }
};

// What backward is given for each pair: the gradients of both losses, and forward's sums.
class PairGradients {
 public:
  PairGradients(const Tensor& grad_mask, const Tensor& grad_dice, const Tensor& sums, int64_t pairs)
      : mask_(torch::stable::contiguous(grad_mask)),
        dice_(torch::stable::contiguous(grad_dice)),
        sums_(torch::stable::contiguous(sums)) {
    STD_TORCH_CHECK(mask_.scalar_type() == ScalarType::Float && mask_.numel() == pairs &&
                        dice_.scalar_type() == ScalarType::Float && dice_.numel() == pairs &&
                        sums_.scalar_type() == ScalarType::Float && sums_.numel() == 4 * pairs,
                    "grad_mask, grad_dice and sums must be float32 for the pairs of assignment");
  }

  float mask(int64_t i) const { return static_cast<const float*>(mask_.data_ptr())[i]; }
  float dice(int64_t i) const { return static_cast<const float*>(dice_.data_ptr())[i]; }
  MaskLossSums sums(int64_t i) const {
    MaskLossSums pair_sums;
    memcpy(&pair_sums, static_cast<const float*>(sums_.data_ptr()) + 4 * i, sizeof pair_sums);
    return pair_sums;
  }

 private:
  Tensor mask_, dice_, sums_;
};

// Zeros with contiguous planes, whose layers, images and queries lie in the order of the logits', so that the gradient
// goes on through the model without a copy. Logits may overlap in memory, the gradient does not. As
// kernels/_layout.py has it.
inline Tensor zero_gradient(const MaskLogits& logits) {
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
  torch::stable::zero_(grad);
  return grad;
}

// Writes the rows of `grad_logits`, zeros so far, that any target is matched to. A row is one thread's, whichever
// targets it was matched to: `make_adder` gives each thread a function (targets, row, pair, grad) that adds a pair's
// gradient to grad [h * w].
template <typename MakeAdder>
void for_matched_rows(const MatchedPairs& pairs, const Tensor& grad_logits, MakeAdder make_adder) {
  const MaskLogits grad_rows(grad_logits);
  const int64_t queries = pairs.logits.queries(), pixels = pairs.logits.h() * pairs.logits.w();
  const int64_t max_targets = pairs.targets.max_targets();
  const auto store_kernel = FASTMASK_SELECT(store_row);
  parallel_for(0, pairs.logits.rows(), 1, [&](int64_t begin, int64_t end) {
    auto add = make_adder();
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
        add(targets, row, i, grad.data());
      }
      if (matched) store_kernel(grad.data(), pixels, grad_logits.data_ptr(), pairs.dtype, grad_rows.offset(row));
    }
  });
}

}  // namespace fastmask
