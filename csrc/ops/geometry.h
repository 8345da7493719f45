// The arguments that the inference operators share: checks them, and turns the geometry (fastmask/ops/_geometry.py)
// into tables of taps.
#pragma once

#include <optional>
#include <vector>

#include "common/taps.h"
#include "common/tiles.h"
#include "ops/tensors.h"

namespace fastmask {

using Sizes = std::vector<int64_t>;
using OptionalSizes = std::optional<std::vector<int64_t>>;

inline const Sizes& checked(const Sizes& size, const char* name) {
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= 1 && size[1] >= 1, name, " must be two sizes of at least 1, got ",
                  in_parentheses(size));
  STD_TORCH_CHECK(size[0] < INT32_MAX && size[1] < INT32_MAX, name, " must be less than 2^31, got ",
                  in_parentheses(size));
  return size;
}

class Geometry {
 public:
  // `rows` and `w` are those of the mask logits that the operator was given.
  Geometry(int64_t rows, int64_t w, const Sizes& grid, const OptionalSizes& padded_size,
           const OptionalSizes& valid_size, const Sizes& size, int64_t in_top, int64_t out_top, int64_t out_rows)
      : grid_(checked(grid, "grid")),
        padded_(padded_size.has_value() ? checked(*padded_size, "padded_size") : grid),
        valid_(valid_size.has_value() ? checked(*valid_size, "valid_size") : padded_),
        size_(checked(size, "size")),
        in_top_(in_top),
        out_top_(out_top),
        out_rows_(out_rows) {
    STD_TORCH_CHECK(valid_[0] <= padded_[0] && valid_[1] <= padded_[1], "valid_size must lie within padded_size, got ",
                    in_parentheses(valid_), " and ", in_parentheses(padded_));
    STD_TORCH_CHECK(grid_[1] == w, "mask_logits must have the columns of grid, ", grid_[1], ", got ", w);
    STD_TORCH_CHECK(in_top >= 0 && rows >= 1 && rows <= grid_[0] - in_top,
                    "in_top and the rows of mask_logits must lie within grid, got ", in_top, " and ", rows, " of ",
                    grid_[0]);
    STD_TORCH_CHECK(out_top >= 0 && out_rows >= 1 && out_rows <= size_[0] - out_top,
                    "out_top and out_rows must lie within size, got ", out_top, " and ", out_rows, " of ", size_[0]);
    const int64_t first = rows_at(out_top, 1).first(), end = rows_at(out_top + out_rows - 1, 1).end();
    STD_TORCH_CHECK(first >= in_top && end <= in_top + rows, "the rows ", out_top, "..", out_top + out_rows,
                    " of the result read the rows ", first, "..", end, " of grid; mask_logits has ", in_top, "..",
                    in_top + rows);
  }

  int64_t out_rows() const { return out_rows_; }
  int64_t width() const { return size_[1]; }

  // Both steps at once, for the band's rows and for all columns. Row indices are relative to in_top.
  TapTable rows() const {
    TapTable taps = rows_at(out_top_, out_rows_);
    taps.count_from(in_top_);
    return taps;
  }
  TapTable columns() const { return {grid_[1], padded_[1], valid_[1], size_[1], 0, size_[1]}; }

  // The second step alone: rows [begin, begin + count) of the band, or columns, from the valid grid.
  TapTable rows_of_valid(int64_t begin, int64_t count) const {
    return {valid_[0], valid_[0], valid_[0], size_[0], out_top_ + begin, count};
  }
  TapTable columns_of_valid(int64_t begin, int64_t count) const {
    return {valid_[1], valid_[1], valid_[1], size_[1], begin, count};
  }
  // The first step alone: rows or columns [begin, end) of the valid grid. Row indices are relative to in_top.
  TapTable valid_rows(int64_t begin, int64_t end) const {
    TapTable taps(grid_[0], padded_[0], padded_[0], padded_[0], begin, end - begin);
    taps.count_from(in_top_);
    return taps;
  }
  TapTable valid_columns(int64_t begin, int64_t end) const {
    return {grid_[1], padded_[1], padded_[1], padded_[1], begin, end - begin};
  }
  int64_t valid_width() const { return valid_[1]; }

 private:
  // Both steps at once: rows [begin, begin + count) of the result from the rows of the grid.
  TapTable rows_at(int64_t begin, int64_t count) const {
    return {grid_[0], padded_[0], valid_[0], size_[0], begin, count};
  }

  Sizes grid_, padded_, valid_, size_;
  int64_t in_top_, out_top_, out_rows_;
};

// Mask logits (B, N, rows, w), plane by plane. Images, queries and rows may have any strides; logits are copied only if
// the pixels of a row are not contiguous.
class QueryPlanes {
 public:
  explicit QueryPlanes(const Tensor& mask_logits)
      : tensor_(with_contiguous_rows(mask_logits)), dtype_(dtype_of(mask_logits, "mask_logits")) {}

  int64_t batch() const { return tensor_.size(0); }
  int64_t queries() const { return tensor_.size(1); }
  int64_t rows() const { return tensor_.size(2); }
  int64_t w() const { return tensor_.size(3); }
  int64_t query_stride() const { return tensor_.stride(1); }

  Plane plane(int64_t image, int64_t query) const {
    const int64_t offset = image * tensor_.stride(0) + query * query_stride();
    return {{tensor_.data_ptr(), dtype_, offset}, rows(), w(), tensor_.stride(2)};
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& logits) {
    check_tensor(logits.dim() == 4 && logits.size(2) > 0 && logits.size(3) > 0, logits, "mask_logits",
                 "(B, N, rows, w) with at least one pixel");
    return logits.size(3) == 1 || logits.stride(3) == 1 ? logits : torch::stable::contiguous(logits);
  }

  Tensor tensor_;
  Dtype dtype_;
};

// All tiles of a result, computed from logits or, if `probabilities`, from resampled probabilities.
inline TilePlans tile_plans(const Geometry& geometry, bool probabilities) {
  if (!probabilities) return {geometry.rows().view(), geometry.columns().view()};
  const TapTable rows = geometry.rows_of_valid(0, geometry.out_rows());
  return {rows.view(), geometry.columns_of_valid(0, geometry.width()).view(),
          geometry.valid_rows(rows.first(), rows.end()).view(), rows.first(),
          geometry.valid_columns(0, geometry.valid_width()).view()};
}

}  // namespace fastmask
