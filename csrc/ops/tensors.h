// Turns PyTorch's tensors into kernel arguments; every size is checked here, before a kernel runs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "common/logits.h"
#include "common/mask_term.h"
#include "common/taps.h"
#include "common/targets.h"
#include "ops/library.h"

namespace fastmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string in_parentheses(const std::vector<int64_t>& sizes) {
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  return "(" + shape + ")";
}

// Throws an error that names the tensor and what was `expected`, unless it is `good`.
inline void check_tensor(bool good, const Tensor& tensor, const char* name, const char* expected) {
  if (good) return;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  STD_TORCH_CHECK(false, name, " must be ", expected, ", got ", torch::headeronly::toString(tensor.scalar_type()), " ",
                  in_parentheses(sizes));
}

// Makes a new tensor and, if that fails, explains why: PyTorch's C interface reports only that there was an error.
template <typename Make>
Tensor new_result(const Make& make, const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  try {
    return make(like, sizes, dtype);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "cannot make a result of shape ", in_parentheses(sizes),
                    ": not enough memory, or too many elements");
  }
}

inline Tensor empty_result(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  const Tensor result = new_result([](auto&&... x) { return torch::stable::new_empty(x...); }, like, sizes, dtype);
  advise_huge_pages(result.data_ptr(), result.numel() * static_cast<int64_t>(result.element_size()));
  return result;
}

inline Tensor zero_result(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return new_result([](auto&&... x) { return torch::stable::new_zeros(x...); }, like, sizes, dtype);
}

// A tensor's elements; the caller has checked their type.
template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The type of logits, or of costs, which may also be float64.
inline Dtype dtype_of(const Tensor& tensor, const char* name, bool costs = false) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::BFloat16) return Dtype::kBFloat16;
  if (type == ScalarType::Half) return Dtype::kFloat16;
  STD_TORCH_CHECK(costs && type == ScalarType::Double, name, " must be float32, ", costs ? "float64, " : "",
                  "bfloat16 or float16, got ", torch::headeronly::toString(type));
  return Dtype::kFloat64;
}

inline MaskTerm mask_term(const std::string& name, double alpha, double gamma) {
  STD_TORCH_CHECK(name == "focal" || name == "bce", "mask_term must be focal or bce, got ", name);
  return {name == "focal", static_cast<float>(alpha), static_cast<float>(gamma)};
}

// The taps from h x w pixels to others, for both axes.
struct ResamplingTable {
  TapTable rows, columns;
  Phases phases;

  ResamplingTable() = default;
  ResamplingTable(int64_t h, int64_t w, int64_t height, int64_t width) {
    STD_TORCH_CHECK(std::max({h, w, height, width}) < INT32_MAX, "maps must have sides of less than 2^31");
    rows = {h, height};
    columns = {w, width};
    phases = {w, width};
  }

  Resampling view() const { return {rows.view(), columns.view(), phases}; }
};

// Mask logits (L, B, N, h, w) with contiguous planes; layers, images and queries may have any strides: a model that
// computes the logits of all layers with one product per image has the images outermost in memory.
class MaskLogits {
 public:
  explicit MaskLogits(const Tensor& logits)
      : tensor_(with_contiguous_planes(logits)), dtype_(dtype_of(logits, "mask_logits")) {
    for (int d = 0; d < 5; ++d) size_[d] = tensor_.size(d);
    for (int d = 0; d < 3; ++d) stride_[d] = tensor_.stride(d);
  }

  const Tensor& tensor() const { return tensor_; }
  Dtype dtype() const { return dtype_; }
  int64_t layers() const { return size_[0]; }
  int64_t batch() const { return size_[1]; }
  int64_t queries() const { return size_[2]; }
  int64_t h() const { return size_[3]; }
  int64_t w() const { return size_[4]; }
  int64_t rows() const { return layers() * batch() * queries(); }

  // The plane of row (l * B + b) * N + n.
  Plane plane(int64_t row) const {
    const int64_t n = row % queries(), b = row / queries() % batch(), l = row / queries() / batch();
    const int64_t offset = l * stride_[0] + b * stride_[1] + n * stride_[2];
    return {{tensor_.data_ptr(), dtype_, offset}, h(), w(), w()};
  }

 private:
  static Tensor with_contiguous_planes(const Tensor& logits) {
    check_tensor(logits.dim() == 5 && logits.size(3) > 0 && logits.size(4) > 0, logits, "mask_logits",
                 "(L, B, N, h, w) with at least one pixel");
    const int64_t h = logits.size(3), w = logits.size(4);
    const bool planes = (w == 1 || logits.stride(4) == 1) && (h == 1 || logits.stride(3) == w);
    return planes ? logits : torch::stable::contiguous(logits);
  }

  Tensor tensor_;
  Dtype dtype_;
  int64_t size_[5], stride_[3];
};

// The targets of a batch with as many images as the mask logits; tensors that are not contiguous are copied.
class BatchTargets {
 public:
  BatchTargets(const Tensor& labels, const std::optional<Tensor>& masks, const std::optional<Tensor>& segments,
               const std::optional<Tensor>& valid, int64_t void_value, bool ignore_void, const MaskLogits& logits)
      : labels_(torch::stable::contiguous(labels)), void_value_(void_value), ignore_void_(ignore_void) {
    check_tensor(labels.dim() == 2 && labels.scalar_type() == ScalarType::Long && labels.size(0) == logits.batch(),
                 labels, "labels", "(B, M) int64 for the B of mask_logits");
    STD_TORCH_CHECK(masks.has_value() != segments.has_value(), "expected exactly one of masks and segments");
    if (masks.has_value()) {
      masks_ = torch::stable::contiguous(*masks);
      check_tensor(
          masks_.dim() == 4 && masks_.size(0) == batch() && masks_.size(1) == max_targets() && is_bytes(masks_), masks_,
          "masks", "(B, M, H, W) uint8 or bool for the B and M of labels");
      height_ = masks_.size(2);
      width_ = masks_.size(3);
    } else {
      segments_ = torch::stable::contiguous(*segments);
      const ScalarType type = segments_.scalar_type();
      check_tensor((type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int) &&
                       segments_.dim() == 3 && segments_.size(0) == batch(),
                   segments_, "segments", "(B, H, W) uint8, int16 or int32 for the B of labels");
      height_ = segments_.size(1);
      width_ = segments_.size(2);
      segment_type_ = type == ScalarType::Byte    ? SegmentType::kUInt8
                      : type == ScalarType::Short ? SegmentType::kInt16
                                                  : SegmentType::kInt32;
    }
    if (valid.has_value()) {
      valid_ = torch::stable::contiguous(*valid);
      check_tensor(valid_.dim() == 3 && valid_.size(0) == batch() && valid_.size(1) == height_ &&
                       valid_.size(2) == width_ && is_bytes(valid_),
                   valid_, "valid", "(B, H, W) bool for the size of the targets");
    }
    STD_TORCH_CHECK(height_ > 0 && width_ > 0, "targets must have at least one pixel, got ", height_, " x ", width_);
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
      targets.segments = static_cast<const uint8_t*>(segments_.data_ptr()) +
                         b * plane * static_cast<int64_t>(segments_.element_size());
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
  int64_t height_ = 0, width_ = 0;
  int64_t void_value_;
  bool ignore_void_;
};

}  // namespace fastmask
