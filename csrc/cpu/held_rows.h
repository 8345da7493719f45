// Keeps the last two rows of a map while its rows are requested from top to bottom.
#pragma once

#include <cstdint>

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

class HeldRows {
 public:
  explicit HeldRows(float* const (&rows)[2]) : rows_{rows[0], rows[1]} {}

  // Row `index`, one of the last two requested or a later one. For a later one, replace(old index, row) is called with
  // the older of the held rows and its index, which is negative if it is empty.
  template <class Replace>
  float* row(int64_t index, const Replace& replace) {
    if (held_[0] == index) return rows_[0];
    if (held_[1] == index) return rows_[1];
    const int slot = held_[0] <= held_[1] ? 0 : 1;
    replace(held_[slot], rows_[slot]);
    held_[slot] = index;
    return rows_[slot];
  }

  // Calls take(index, row) for the held rows.
  template <class Take>
  void each(const Take& take) const {
    for (int slot = 0; slot < 2; ++slot) take(held_[slot], rows_[slot]);
  }

 private:
  float* rows_[2];
  int64_t held_[2] = {-2, -1};
};

}  // namespace fastmask::FASTMASK_SIMD
