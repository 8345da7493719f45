// Run lengths of a binary mask, in the compressed form of the COCO tools.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastmask {

// Rows of a mask, one byte (0 or 1) or one bit a pixel, the first pixel in the lowest bit.
struct BinaryMask {
  const uint8_t* data;
  int64_t height, width;
  int64_t row_bytes;
  bool packed;
};

// Encodes masks one after the other; the memory that it works in is kept between them.
class RunLengthEncoder {
 public:
  // Lengths of runs of equal pixels, columns first, the first of them of background; each as its difference from the
  // last but one (from the fourth on), in digits of 5 bits, lowest first, a sixth bit saying that more follow, as
  // characters from '0' on.
  void encode(const BinaryMask& mask, std::string& out);

 private:
  void find_changes(const BinaryMask& mask);
  void load_row(const BinaryMask& mask, int64_t y, std::vector<uint64_t>& words) const;

  std::vector<uint64_t> row_, above_, first_row_;
  std::vector<int32_t> change_column_, change_row_;  // in order of rows
  std::vector<int32_t> sorted_rows_;                 // in order of columns
  std::vector<int64_t> column_end_;
};

}  // namespace fastmask
