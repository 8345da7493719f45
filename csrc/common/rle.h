// Run-length encoding of binary masks, in the compressed format of the COCO tools.
//
// Lengths of runs of equal pixels, column by column, starting with background. From the fourth on, a run is stored as
// its difference from the run two before it. Numbers are stored in 5-bit digits, lowest first; a sixth bit says that
// more follow. Digits are characters from '0' on.
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

  // Returns the number of foreground pixels of the result.
  int64_t encode(const BinaryMask& mask, std::string& out);

 private:
  void turn_columns(const BinaryMask& mask, int64_t left, int64_t count);

  std::vector<int64_t> inputs_;         // the rows of the mask that the result has
  std::vector<int64_t> starts_;         // the first row of the result with each of them
  const std::vector<int64_t> columns_;  // of the mask, for each column of the result
  const int64_t height_;
  std::vector<uint64_t> turned_;  // [words, 64]: bits of 64 rows in each of 64 columns
  std::vector<char> digits_;
};

}  // namespace fastmask
