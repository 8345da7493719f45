// From PyTorch's tensors to what the kernels take; every size is checked here, at the door.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/mask_term.h"
#include "common/targets.h"

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor on the device of another. PyTorch's interface in C says of a failure only that there was one.
template <typename Make>
Tensor new_result(const Make& make, const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  try {
    return make(like, sizes, dtype);
  } catch (const std::exception&) {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "cannot make a result of shape (", shape,
                    "): not enough memory, or more than can be counted");
  }
}

inline Tensor empty_result(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return new_result([](auto&&... x) { return torch::stable::new_empty(x...); }, like, sizes, dtype);
}

inline Tensor zero_result(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return new_result([](auto&&... x) { return torch::stable::new_zeros(x...); }, like, sizes, dtype);
}

inline Dtype logit_dtype(const Tensor& logits, const char* name) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline MaskTerm mask_term(const std::string& name, double alpha, double gamma) {
  STD_TORCH_CHECK(name == "focal" || name == "bce", "mask_term must be focal or bce, got ", name);
  return {name == "focal", static_cast<float>(alpha), static_cast<float>(gamma)};
}

// Mask logits (L, B, N, h, w) whose planes are contiguous while layers, images and queries may lie anywhere: a model
// that makes the logits of all layers with one product per image has the images outermost in memory.
class MaskLogits {
 public:
  explicit MaskLogits(const Tensor& logits) : tensor_(with_contiguous_planes(logits)) {
    for (int i = 0; i < 3; ++i) stride_[i] = tensor_.stride(i);
  }

  const Tensor& tensor() const { return tensor_; }
  const void* data() const { return tensor_.data_ptr(); }
  int64_t layers() const { return tensor_.size(0); }
  int64_t batch() const { return tensor_.size(1); }
  int64_t queries() const { return tensor_.size(2); }
  int64_t h() const { return tensor_.size(3); }
  int64_t w() const { return tensor_.size(4); }
  int64_t rows() const { return layers() * batch() * queries(); }

  // The first element of the plane of row (l * B + b) * N + n.
  int64_t offset(int64_t row) const {
    const int64_t n = row % queries(), b = row / queries() % batch(), l = row / queries() / batch();
    return l * stride_[0] + b * stride_[1] + n * stride_[2];
  }

 private:
  static Tensor with_contiguous_planes(const Tensor& logits) {
    STD_TORCH_CHECK(logits.dim() == 5, "mask_logits must be (L, B, N, h, w)");
    const int64_t h = logits.size(3), w = logits.size(4);
    STD_TORCH_CHECK(h > 0 && w > 0, "mask_logits must have at least one pixel");
    const bool planes = (w == 1 || logits.stride(4) == 1) && (h == 1 || logits.stride(3) == w);
    return planes ? logits : torch::stable::contiguous(logits);
  }

  Tensor tensor_;
  int64_t stride_[3];
};

// The targets of a batch, with contiguous copies of its tensors where they were not.
class BatchTargets {
 public:
  BatchTargets(const Tensor& labels, const std::optional<Tensor>& masks, const std::optional<Tensor>& segments,
               const std::optional<Tensor>& valid, int64_t void_value, bool ignore_void)
      : labels_(torch::stable::contiguous(labels)), void_value_(void_value), ignore_void_(ignore_void) {
    STD_TORCH_CHECK(labels.dim() == 2 && labels.scalar_type() == ScalarType::Long, "labels must be (B, M) int64");
    STD_TORCH_CHECK(masks.has_value() != segments.has_value(), "expected exactly one of masks and segments");
    if (masks.has_value()) {
      masks_ = torch::stable::contiguous(*masks);
      STD_TORCH_CHECK(
          masks_.dim() == 4 && masks_.size(0) == batch() && masks_.size(1) == max_targets() && is_bytes(masks_),
          "masks must be (B, M, H, W) uint8 or bool for the B and M of labels");
      height_ = masks_.size(2);
      width_ = masks_.size(3);
    } else {
      segments_ = torch::stable::contiguous(*segments);
      STD_TORCH_CHECK(segments_.dim() == 3 && segments_.size(0) == batch(), "segments must be (B, H, W)");
      height_ = segments_.size(1);
      width_ = segments_.size(2);
      switch (segments_.scalar_type()) {
        case ScalarType::Byte:
          segment_type_ = SegmentType::kUInt8;
          segment_bytes_ = 1;
          break;
        case ScalarType::Short:
          segment_type_ = SegmentType::kInt16;
          segment_bytes_ = 2;
          break;
        case ScalarType::Int:
          segment_type_ = SegmentType::kInt32;
          segment_bytes_ = 4;
          break;
        default:
          STD_TORCH_CHECK(false, "segments must be uint8, int16 or int32");
      }
    }
    if (valid.has_value()) {
      valid_ = torch::stable::contiguous(*valid);
      STD_TORCH_CHECK(valid_.dim() == 3 && valid_.size(0) == batch() && valid_.size(1) == height_ &&
                          valid_.size(2) == width_ && is_bytes(valid_),
                      "valid must be (B, H, W) bool for the size of the targets");
    }
    STD_TORCH_CHECK(height_ > 0 && width_ > 0, "targets must have at least one pixel");
  }

  int64_t batch() const { return labels_.size(0); }
  int64_t max_targets() const { return labels_.size(1); }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  const int64_t* labels(int64_t image) const {
    return static_cast<const int64_t*>(labels_.data_ptr()) + image * max_targets();
  }

  ImageTargets image(int64_t b) const {
    const int64_t plane = height_ * width_;
    ImageTargets targets{};
    targets.height = height_;
    targets.width = width_;
    while (targets.count < max_targets() && labels(b)[targets.count] >= 0) ++targets.count;
    if (masks_.defined()) {
      targets.masks = static_cast<const uint8_t*>(masks_.data_ptr()) + b * max_targets() * plane;
    } else {
      targets.segments = static_cast<const uint8_t*>(segments_.data_ptr()) + b * plane * segment_bytes_;
    }
    targets.segment_type = segment_type_;
    if (valid_.defined()) targets.valid = static_cast<const uint8_t*>(valid_.data_ptr()) + b * plane;
    targets.void_value = void_value_;
    targets.ignore_void = ignore_void_;
    return targets;
  }

 private:
  static bool is_bytes(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Byte || tensor.scalar_type() == ScalarType::Bool;
  }

  Tensor labels_, masks_, segments_, valid_;
  SegmentType segment_type_ = SegmentType::kUInt8;
  int64_t segment_bytes_ = 1;
  int64_t height_ = 0, width_ = 0;
  int64_t void_value_;
  bool ignore_void_;
};

}  // namespace fastmask
