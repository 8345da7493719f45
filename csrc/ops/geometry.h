// The last arguments of the inference operators (fastmask/ops/_geometry.py), checked and made into tables.
#pragma once

#include <optional>
#include <vector>

#include "common/taps.h"
#include "ops/tensors.h"

namespace fastmask {

using Sizes = std::vector<int64_t>;
using OptionalSizes = std::optional<std::vector<int64_t>>;

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
    STD_TORCH_CHECK(valid_[0] <= padded_[0] && valid_[1] <= padded_[1], "valid_size must lie within padded_size");
    STD_TORCH_CHECK(grid_[1] == w, "mask_logits must have the columns of grid, ", grid_[1], ", got ", w);
    STD_TORCH_CHECK(in_top >= 0 && rows >= 1 && rows <= grid_[0] - in_top,
                    "in_top and the rows of mask_logits must lie "
                    "within grid");
    STD_TORCH_CHECK(out_top >= 0 && out_rows >= 1 && out_rows <= size_[0] - out_top,
                    "out_top and out_rows must lie within size");
    const int64_t first = rows_at(out_top, 1).first(), end = rows_at(out_top + out_rows - 1, 1).end();
    STD_TORCH_CHECK(first >= in_top && end <= in_top + rows, "the rows ", out_top, "..", out_top + out_rows,
                    " of the result read the rows ", first, "..", end, " of grid; mask_logits has ", in_top, "..",
                    in_top + rows);
  }

  int64_t out_rows() const { return out_rows_; }
  int64_t width() const { return size_[1]; }

  // Both steps at once, of the band's rows and of all columns. Indices of rows count from in_top.
  AxisTaps rows() const {
    AxisTaps taps = rows_at(out_top_, out_rows_);
    taps.count_from(in_top_);
    return taps;
  }
  AxisTaps columns() const { return {grid_[1], padded_[1], valid_[1], size_[1], 0, size_[1]}; }

  // The steps one by one. The second: rows [begin, begin + count) of the band, or columns, from the valid grid.
  AxisTaps rows_of_valid(int64_t begin, int64_t count) const {
    return {valid_[0], valid_[0], valid_[0], size_[0], out_top_ + begin, count};
  }
  AxisTaps columns_of_valid(int64_t begin, int64_t count) const {
    return {valid_[1], valid_[1], valid_[1], size_[1], begin, count};
  }
  // The first: rows or columns [begin, end) of the valid grid. Indices of rows count from in_top.
  AxisTaps valid_rows(int64_t begin, int64_t end) const {
    AxisTaps taps(grid_[0], padded_[0], padded_[0], padded_[0], begin, end - begin);
    taps.count_from(in_top_);
    return taps;
  }
  AxisTaps valid_columns(int64_t begin, int64_t end) const {
    return {grid_[1], padded_[1], padded_[1], padded_[1], begin, end - begin};
  }
  int64_t valid_width() const { return valid_[1]; }

 private:
  static const Sizes& checked(const Sizes& size, const char* name) {
    STD_TORCH_CHECK(size.size() == 2 && size[0] >= 1 && size[1] >= 1, name, " must be two sizes of at least 1");
    STD_TORCH_CHECK(size[0] < INT32_MAX && size[1] < INT32_MAX, name, " must be less than 2^31");
    return size;
  }

  // Rows [begin, begin + count) of the result, both steps at once, from those of the grid.
  AxisTaps rows_at(int64_t begin, int64_t count) const {
    return {grid_[0], padded_[0], valid_[0], size_[0], begin, count};
  }

  Sizes grid_, padded_, valid_, size_;
  int64_t in_top_, out_top_, out_rows_;
};

}  // namespace fastmask
