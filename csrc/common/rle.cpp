#include "common/rle.h"

#include <cstring>

#include "common/carver.h"
#include "common/taps.h"

namespace fastmask {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kMostDigits = 13;  // of a number of 64 bits
constexpr int64_t kShort = 512;      // numbers from -512 to 511 have at most two digits

// The digits of short numbers; writing them takes no branches, which noise would make unpredictable.
struct ShortNumbers {
  uint8_t first[2 * kShort] = {}, second[2 * kShort] = {}, count[2 * kShort] = {};

  constexpr ShortNumbers() {
    for (int64_t number = -kShort; number < kShort; ++number) {
      const bool two = number < -16 || number > 15;
      first[number + kShort] = static_cast<uint8_t>('0' + (number & 0x1f) + (two ? 0x20 : 0));
      second[number + kShort] = static_cast<uint8_t>('0' + (number >> 5 & 0x1f));
      count[number + kShort] = two ? 2 : 1;
    }
  }
};
constexpr ShortNumbers kShortNumbers;

// Packs eight bytes of 0 or 1 into the bits of one byte: the product moves the lowest bit of byte i to bit 56 + i.
uint64_t gather_bits(const uint8_t* bytes, int64_t count) {
  uint64_t eight = 0;
  memcpy(&eight, bytes, count < 8 ? count : 8);
  return (eight & 0x0101010101010101u) * 0x0102040810204080u >> 56;
}

// `count` pixels of a row from pixel `left` on, which is a multiple of 64, as bits; 0 beyond them.
uint64_t load_pixels(const BinaryMask& mask, int64_t row, int64_t left, int64_t count) {
  const uint8_t* pixels = mask.data + row * mask.row_bytes + (mask.packed ? left / 8 : left);
  uint64_t word = 0;
  if (mask.packed) {
    memcpy(&word, pixels, ceil_div(count, 8));
    return count < kWord ? word & ((uint64_t{1} << count) - 1) : word;
  }
  for (int64_t j = 0; j < count; j += 8) word |= gather_bits(pixels + j, count - j) << j;
  return word;
}

// Exchanges rows and columns of 64 x 64 bits, quarter by quarter of ever smaller squares.
void transpose(uint64_t* rows) {
  uint64_t low = 0x00000000ffffffffu;
  for (int64_t side = 32; side > 0; side /= 2, low ^= low << side) {
    for (int64_t top = 0; top < kWord; top += 2 * side) {
      for (int64_t i = top; i < top + side; ++i) {
        const uint64_t moved = ((rows[i] >> side) ^ rows[i + side]) & low;
        rows[i] ^= moved << side;
        rows[i + side] ^= moved;
      }
    }
  }
}

// Writes the lengths of runs in the order in which they are found.
class RunWriter {
 public:
  explicit RunWriter(std::vector<char>& digits) : digits_(digits) {}

  // Makes room for more runs.
  void reserve(int64_t runs) {
    const int64_t needed = size_ + runs * kMostDigits;
    if (needed > static_cast<int64_t>(digits_.size())) digits_.resize(2 * needed);
  }

  // A run ends before pixel `position`.
  void end_run(int64_t position) {
    const int64_t length = position - begin_;
    begin_ = position;
    int64_t rest = length - last_but_one_;
    foreground_ += count_ % 2 != 0 ? length : 0;
    last_but_one_ = ++count_ > 2 ? last_ : 0;
    last_ = length;
    const uint64_t place = static_cast<uint64_t>(rest + kShort);
    if (place < 2 * kShort) {
      digits_[size_] = static_cast<char>(kShortNumbers.first[place]);
      digits_[size_ + 1] = static_cast<char>(kShortNumbers.second[place]);
      size_ += kShortNumbers.count[place];
      return;
    }
    bool more = true;
    while (more) {
      const int64_t digit = rest & 0x1f;
      rest >>= 5;
      more = rest != ((digit & 0x10) != 0 ? -1 : 0);
      digits_[size_++] = static_cast<char>('0' + (digit | (more ? 0x20 : 0)));
    }
  }

  void write(std::string& out) const { out.assign(digits_.data(), size_); }
  int64_t foreground() const { return foreground_; }  // pixels

 private:
  std::vector<char>& digits_;
  int64_t size_ = 0, begin_ = 0, count_ = 0, last_ = 0, last_but_one_ = 0, foreground_ = 0;
};

}  // namespace

RunLengthEncoder::RunLengthEncoder(int64_t h, int64_t w, int64_t height, int64_t width)
    : columns_(nearest_taps(w, width)), height_(height) {
  const std::vector<int64_t> rows = nearest_taps(h, height);
  for (int64_t y = 0; y < height; ++y) {
    if (y > 0 && rows[y] == rows[y - 1]) continue;
    inputs_.push_back(rows[y]);
    starts_.push_back(y);
  }
  turned_.resize(ceil_div(static_cast<int64_t>(inputs_.size()), kWord) * kWord);
}

void RunLengthEncoder::turn_columns(const BinaryMask& mask, int64_t left, int64_t count) {
  const int64_t rows = static_cast<int64_t>(inputs_.size());
  for (int64_t top = 0; top < rows; top += kWord) {
    uint64_t* words = turned_.data() + top;
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t i = 0; i < kWord; ++i) {
      words[i] = top + i < rows ? load_pixels(mask, inputs_[top + i], left, count) : 0;
      any |= words[i];
      all &= words[i];
    }
    if (any != 0 && all != ~uint64_t{0}) transpose(words);
  }
}

int64_t RunLengthEncoder::encode(const BinaryMask& mask, std::string& out) {
  const int64_t rows = static_cast<int64_t>(inputs_.size());
  RunWriter runs(digits_);
  uint64_t last = 0;      // the pixel before
  int64_t begin = 0;      // of the column, among all pixels
  int64_t left = -kWord;  // of the turned columns
  for (const int64_t column : columns_) {
    if (column - left >= kWord) {
      left = column / kWord * kWord;
      turn_columns(mask, left, mask.width - left < kWord ? mask.width - left : kWord);
    }
    for (int64_t top = 0; top < rows; top += kWord) {
      const int64_t count = rows - top < kWord ? rows - top : kWord;
      const uint64_t word = turned_[top + column - left];
      uint64_t changes = word ^ (word << 1 | last);
      if (count < kWord) changes &= (uint64_t{1} << count) - 1;
      last = word >> (count - 1) & 1;
      if (changes == 0) continue;
      runs.reserve(kWord);
      for (; changes != 0; changes &= changes - 1) runs.end_run(begin + starts_[top + __builtin_ctzll(changes)]);
    }
    begin += height_;
  }
  runs.reserve(1);
  runs.end_run(begin);
  runs.write(out);
  return runs.foreground();
}

}  // namespace fastmask
