#include "cpu/semantic.h"

#include "cpu/semantic_choice.h"
#include "cpu/semantic_mix.h"
#include "cpu/semantic_strip.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

class StripInference {
 public:
  StripInference(const PackedLogits& packed, const ClassTable& table, const Taps& rows, const Taps& columns,
                 int64_t strip, const SemanticMaps& maps, const SemanticWorkspace& work)
      : table_(table),
        maps_(maps),
        skip_(packed.cells != nullptr),
        left_(strip * kStrip),
        width_(maps.width - left_ < kStrip ? maps.width - left_ : kStrip),
        strip_(packed, rows, columns, strip, work.strip),
        choice_(table, work.choice),
        work_(work) {
    for (int64_t n = 0; n < packed.queries; ++n) work.all[n] = static_cast<int32_t>(n);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t y = begin, next; y < end; y = next) {
      next = strip_.same_rows(y, end);
      strip_.go_to(y);
      if (skip_ && few_queries(y, next)) continue;
      for (int64_t row = y; row < next; ++row) all_queries(row);
    }
    decide_doubtful();
  }

 private:
  static constexpr int64_t kLongestPause = 16;

  void all_queries(int64_t y) {
    strip_.sigmoids(work_.all, table_.queries, y, work_.sigmoids);
    write_row(maps_, table_.classes, y * maps_.width + left_, width_, [&](int64_t j, auto& consumer) {
      mix_classes(table_, work_.all, table_.queries, nullptr, work_.sigmoids + j, kStrip, consumer);
    });
  }

  // Finds the labels of the rows [y, end), which read the same logits, from the queries that matter there; pixels that
  // these leave undecided are kept for decide_doubtful. Returns false if those are too many: then the work was in vain,
  // and is not tried again for a while.
  bool few_queries(int64_t y, int64_t end) {
    if (pause_ > 0) {
      --pause_;
      return false;
    }
    strip_.bounds(choice_.bounds());
    if (!choice_.choose()) {
      pause();
      return false;
    }
    const int64_t pixels = (end - y) * width_;
    int64_t open = 0;
    for (int64_t row = y; row < end && 4 * open <= 3 * pixels; ++row) open = few_queries_row(row, row - y, open);
    // A pixel's cost is proportional to the number of queries, and an undecided pixel needs all of them again.
    if (open * table_.queries > (table_.queries - choice_.count()) * pixels) {
      pause();
    } else {
      next_pause_ = 1;
    }
    if (4 * open > 3 * pixels) return false;
    keep_doubtful(y, open);
    return true;
  }

  void pause() {
    pause_ = next_pause_;
    next_pause_ = next_pause_ < kLongestPause ? 2 * next_pause_ : kLongestPause;
  }

  // Appends the undecided pixels to open_, which already holds `open` pixels; returns their new number.
  int64_t few_queries_row(int64_t y, int64_t row, int64_t open) {
    strip_.sigmoids(choice_.chosen(), choice_.count(), y, work_.sigmoids);
    int32_t labels[kStrip];
    for (int64_t j = 0; j < width_; j += kMixPixels) {
      RoughBestTwo best(choice_.tag_mask());
      mix_classes(table_, choice_.chosen(), choice_.count(), choice_.above(), work_.sigmoids + j, kStrip, best);
      for (int v = 0; v < kMixVectors; ++v) {
        const int64_t column = j + v * kLanes;
        const vint label = bits(best.best[v]) & best.tag_mask;
        store(labels + column, label);
        const vint certain = best.best[v] - best.second[v] > choice_.doubt(best.best[v], label);
        uint32_t doubtful = lane_bits(certain) ^ kAllLanes;
        for (; doubtful != 0; doubtful &= doubtful - 1) {
          const int64_t at = column + __builtin_ctz(doubtful);
          if (at < width_) open_[open++] = static_cast<int32_t>(row * kStrip + at);
        }
      }
    }
    write_labels(maps_, y * maps_.width + left_, labels, width_);
    return open;
  }

  // Computes the sigmoids of all queries at the pixels in open_, and decides these pixels when they fill a strip.
  void keep_doubtful(int64_t y, int64_t open) {
    for (int64_t begin = 0, count; begin < open; begin += count) {
      count = open - begin < kLanes ? open - begin : kLanes;
      int32_t rows[kLanes], columns[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int32_t place = open_[i < count ? begin + i : begin];
        rows[i] = static_cast<int32_t>(y + place / kStrip);
        columns[i] = static_cast<int32_t>(place % kStrip);
      }
      strip_.sigmoids_at(load(rows), load(columns), work_.doubtful_sigmoids + doubtful_, kDoubtfulStride);
      for (int64_t i = 0; i < count; ++i) doubtful_at_[doubtful_ + i] = rows[i] * maps_.width + left_ + columns[i];
      doubtful_ += count;
      if (doubtful_ >= kStrip) decide_doubtful();
    }
  }

  // Decides the first pixels, as many as fill a strip.
  void decide_doubtful() {
    const int64_t count = doubtful_ < kStrip ? doubtful_ : kStrip;
    for (int64_t j = 0; j < count; j += kMixPixels) {
      BestClass best;
      mix_classes(table_, work_.all, table_.queries, nullptr, work_.doubtful_sigmoids + j, kDoubtfulStride, best);
      int32_t labels[kMixPixels];
      memcpy(labels, best.label, sizeof best.label);
      for (int64_t i = 0; i < kMixPixels && j + i < count; ++i) write_labels(maps_, doubtful_at_[j + i], labels + i, 1);
    }
    doubtful_ -= count;
    for (int64_t i = 0; i < doubtful_; ++i) doubtful_at_[i] = doubtful_at_[count + i];
    for (int64_t n = 0; n < table_.queries && doubtful_ > 0; ++n) {
      float* row = work_.doubtful_sigmoids + n * kDoubtfulStride;
      for (int64_t i = 0; i < doubtful_; i += kLanes) store(row + i, load(row + count + i));
    }
  }

  const ClassTable& table_;
  const SemanticMaps& maps_;
  const bool skip_;
  const int64_t left_, width_;
  MaskStrip strip_;
  QueryChoice choice_;
  const SemanticWorkspace& work_;
  int64_t doubtful_at_[kStrip + kLanes];
  int64_t doubtful_ = 0;
  int32_t open_[kRowsTogether * kStrip];  // row of the tile * kStrip + column
  int64_t pause_ = 0, next_pause_ = 1;
};

}  // namespace

void semantic_strip(const PackedLogits& packed, const ClassTable& table, const Taps& rows, const Taps& columns,
                    int64_t strip, int64_t begin, int64_t end, const SemanticMaps& maps,
                    const SemanticWorkspace& work) {
  StripInference(packed, table, rows, columns, strip, maps, work).run(begin, end);
}

}  // namespace fastmask::FASTMASK_SIMD
