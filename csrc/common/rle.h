// Run-length encoding of binary masks, in the compressed format of the COCO tools.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastmask {

// Rows of a mask with one byte (0 or 1) or one bit per pixel; the first pixel is in the lowest bit.
struct BinaryMask {
  const uint8_t* data;
  int64_t height, width;
  int64_t row_bytes;
  bool packed;
};

// Encodes one mask of h x w pixels after another, resized to height x width by the "nearest" rule, reusing its memory.
// A resized mask is never made: its rows and columns repeat those of the mask.
class RunLengthEncoder {
 public:
  RunLengthEncoder(int64_t h, int64_t w, int64_t height, int64_t width);

  // Lengths of runs of equal pixels, column by column, starting with background. From the fourth on, a run is stored as
  // its difference from the run two before it. Numbers are stored in 5-bit digits, lowest first; a sixth bit says that
  // more follow. Digits are characters from '0' on.
  void encode(const BinaryMask& mask, std::string& out);

 private:
  void find_changes(const BinaryMask& mask);
  void load_row(const BinaryMask& mask, int64_t y, std::vector<uint64_t>& words) const;

  const std::vector<int64_t> rows_, columns_;  // of the mask, for each row and column of the result
  std::vector<uint64_t> row_, above_, first_row_;
  std::vector<int32_t> change_column_, change_row_;  // in order of rows
  std::vector<int32_t> sorted_rows_;                 // in order of columns
  std::vector<int64_t> column_end_;
};

}  // namespace fastmask
