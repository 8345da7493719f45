// Mask logits (B, N, rows, w) of the inference operators, plane by plane.
#pragma once

#include "common/tiles.h"
#include "ops/geometry.h"
#include "ops/tensors.h"

namespace fastmask {

// Images, queries and rows may lie anywhere; only where neighbors of a row do not lie side by side is there a copy.
class QueryPlanes {
 public:
  explicit QueryPlanes(const Tensor& mask_logits)
      : tensor_(with_contiguous_rows(mask_logits)), dtype_(logit_dtype(mask_logits, "mask_logits")) {}

  const Tensor& tensor() const { return tensor_; }
  int64_t batch() const { return tensor_.size(0); }
  int64_t queries() const { return tensor_.size(1); }
  int64_t rows() const { return tensor_.size(2); }
  int64_t w() const { return tensor_.size(3); }

  Plane plane(int64_t image, int64_t query) const {
    return {tensor_.data_ptr(), image * tensor_.stride(0) + query * tensor_.stride(1), tensor_.stride(2), dtype_};
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& logits) {
    STD_TORCH_CHECK(logits.dim() == 4, "mask_logits must be (B, N, rows, w)");
    STD_TORCH_CHECK(logits.size(2) > 0 && logits.size(3) > 0, "mask_logits must have at least one pixel");
    return logits.size(3) == 1 || logits.stride(3) == 1 ? logits : torch::stable::contiguous(logits);
  }

  Tensor tensor_;
  Dtype dtype_;
};

// All tiles of a result that is made of logits, or of probabilities that are resampled once more.
inline TilePlans tile_plans(const Geometry& geometry, bool probabilities) {
  if (!probabilities) return {geometry.rows().view(), geometry.columns().view()};
  const AxisTaps rows = geometry.rows_of_valid(0, geometry.out_rows());
  return {rows.view(), geometry.columns_of_valid(0, geometry.width()).view(),
          geometry.valid_rows(rows.first(), rows.end()).view(), rows.first(),
          geometry.valid_columns(0, geometry.valid_width()).view()};
}

}  // namespace fastmask
