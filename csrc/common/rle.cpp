#include "common/rle.h"

#include <cstring>

#include "common/carver.h"
#include "common/taps.h"

namespace fastmask {
namespace {

bool bit(const std::vector<uint64_t>& words, int64_t i) { return (words[i / 64] >> (i % 64) & 1) != 0; }

// Packs eight bytes of 0 or 1 into the bits of one byte: the product moves the lowest bit of byte i to bit 56 + i.
uint64_t gather_bits(const uint8_t* bytes, int64_t count) {
  uint64_t eight = 0;
  memcpy(&eight, bytes, count < 8 ? count : 8);
  return (eight & 0x0101010101010101u) * 0x0102040810204080u >> 56;
}

// Writes the lengths of runs in the order in which they are found.
class RunWriter {
 public:
  explicit RunWriter(std::string& out) : out_(out) {}

  // A run ends before pixel `position`.
  void end_run(int64_t position) {
    const int64_t length = position - begin_;
    begin_ = position;
    int64_t rest = count_ > 2 ? length - last_but_one_ : length;
    last_but_one_ = last_;
    last_ = length;
    ++count_;
    bool more = true;
    while (more) {
      const int64_t digit = rest & 0x1f;
      rest >>= 5;
      more = rest != ((digit & 0x10) != 0 ? -1 : 0);
      out_.push_back(static_cast<char>('0' + (digit | (more ? 0x20 : 0))));
    }
  }

 private:
  std::string& out_;
  int64_t begin_ = 0, count_ = 0, last_ = 0, last_but_one_ = 0;
};

}  // namespace

RunLengthEncoder::RunLengthEncoder(int64_t h, int64_t w, int64_t height, int64_t width)
    : rows_(nearest_taps(h, height)), columns_(nearest_taps(w, width)) {}

void RunLengthEncoder::load_row(const BinaryMask& mask, int64_t y, std::vector<uint64_t>& words) const {
  const uint8_t* row = mask.data + y * mask.row_bytes;
  words.back() = 0;
  if (mask.packed) {
    memcpy(words.data(), row, ceil_div(mask.width, 8));
    return;
  }
  for (size_t i = 0; i < words.size(); ++i) {
    const int64_t begin = 64 * static_cast<int64_t>(i);
    uint64_t word = 0;
    for (int64_t j = 0; j < 64 && begin + j < mask.width; j += 8) {
      word |= gather_bits(row + begin + j, mask.width - begin - j) << j;
    }
    words[i] = word;
  }
}

void RunLengthEncoder::find_changes(const BinaryMask& mask) {
  const int64_t words = ceil_div(mask.width, 64);
  row_.resize(words);
  above_.resize(words);
  change_column_.clear();
  change_row_.clear();
  load_row(mask, rows_[0], above_);
  first_row_ = above_;
  column_end_.assign(mask.width + 1, 0);
  for (size_t y = 1; y < rows_.size(); ++y) {
    if (rows_[y] == rows_[y - 1]) continue;
    load_row(mask, rows_[y], row_);
    for (int64_t i = 0; i < words; ++i) {
      for (uint64_t changed = row_[i] ^ above_[i]; changed != 0; changed &= changed - 1) {
        const int64_t column = 64 * i + __builtin_ctzll(changed);
        if (column >= mask.width) break;
        change_column_.push_back(static_cast<int32_t>(column));
        change_row_.push_back(static_cast<int32_t>(y));
        ++column_end_[column + 1];
      }
    }
    row_.swap(above_);
  }
}

void RunLengthEncoder::encode(const BinaryMask& mask, std::string& out) {
  find_changes(mask);
  // A stable counting sort by column: each column's changes begin where those of the previous column end.
  for (int64_t j = 0; j < mask.width; ++j) column_end_[j + 1] += column_end_[j];
  sorted_rows_.resize(change_row_.size());
  for (size_t i = 0; i < change_row_.size(); ++i) sorted_rows_[column_end_[change_column_[i]]++] = change_row_[i];

  RunWriter runs(out);
  bool last = false;
  const int64_t height = static_cast<int64_t>(rows_.size());
  int64_t begin = 0;  // of the column, among all pixels
  for (const int64_t column : columns_) {
    const bool top = bit(first_row_, column);
    if (top != last) runs.end_run(begin);
    for (int64_t i = column > 0 ? column_end_[column - 1] : 0; i < column_end_[column]; ++i) {
      runs.end_run(begin + sorted_rows_[i]);
    }
    last = bit(above_, column);
    begin += height;
  }
  runs.end_run(begin);
}

}  // namespace fastmask
