#include "cpu/semantic.h"

#include "cpu/class_mix.h"
#include "cpu/mask_strip.h"
#include "cpu/query_choice.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

template <class T>
inline void convert_labels(const int32_t* labels, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(labels[i]);
}

class StripInference {
 public:
  StripInference(const MaskPlanes& planes, const ClassTable& table, const Taps& rows, const Taps& columns,
                 int64_t strip, const float* cells, const SemanticMaps& maps, Scratch scratch)
      : table_(table),
        maps_(maps),
        cells_(cells),
        left_(strip * kStrip),
        width_(maps.width - left_ < kStrip ? maps.width - left_ : kStrip),
        strip_(planes, rows, columns, strip, scratch),
        choice_(table, scratch) {
    all_ = scratch.take<int32_t>(to_full_vectors(planes.queries));
    for (int64_t n = 0; n < planes.queries; ++n) all_[n] = static_cast<int32_t>(n);
    sigmoids_ = scratch.take(planes.queries * kStrip);
    doubtful_sigmoids_ = scratch.take(planes.queries * kDoubtfulStride);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t y = begin, next; y < end; y = next) {
      next = strip_.same_rows(y, end);
      strip_.go_to(y);
      if (cells_ != nullptr && few_queries(y, next)) continue;
      for (int64_t row = y; row < next; ++row) all_queries(row);
    }
    decide_doubtful();
  }

 private:
  static constexpr int64_t kDoubtfulStride = kStrip + 16;

  void all_queries(int64_t y) {
    strip_.sigmoids(all_, table_.queries, y, sigmoids_);
    const int64_t at = y * maps_.width + left_;
    int32_t labels[kStrip];
    for (int64_t j = 0; j < width_; j += kMixPixels) {
      const int64_t count = width_ - j < kMixPixels ? width_ - j : kMixPixels;
      if (maps_.scores != nullptr) {
        StoreScores scores{maps_.scores + at + j, maps_.rows * maps_.width, count};
        mix_classes(table_, all_, table_.queries, nullptr, sigmoids_ + j, kStrip, scores);
      } else if (maps_.score != nullptr) {
        BestTwoClasses best;
        mix_classes(table_, all_, table_.queries, nullptr, sigmoids_ + j, kStrip, best);
        memcpy(labels + j, best.label, sizeof best.label);
        best.write(table_.classes, count, maps_.score + at + j, maps_.margin + at + j);
      } else {
        BestClass best;
        mix_classes(table_, all_, table_.queries, nullptr, sigmoids_ + j, kStrip, best);
        memcpy(labels + j, best.label, sizeof best.label);
      }
    }
    if (maps_.labels != nullptr) write_labels(y, labels);
  }

  // Labels of the rows [y, end), which read the same logits, from the queries that matter there; pixels that these
  // leave open are kept for decide_doubtful. False where that are too many: then it was in vain, and is not tried again
  // for a while.
  bool few_queries(int64_t y, int64_t end) {
    if (pause_ > 0) {
      --pause_;
      return false;
    }
    strip_.bounds(cells_, choice_.bounds());
    if (!choice_.choose()) return false;
    const int64_t most_open = (end - y) * width_ / 4;
    int64_t open = 0;
    for (int64_t row = y; row < end && open <= most_open; ++row) open = few_queries_row(row, row - y, open);
    if (open > most_open) {
      pause_ = next_pause_;
      next_pause_ = next_pause_ < 32 ? 2 * next_pause_ : 32;
      return false;
    }
    next_pause_ = 1;
    keep_doubtful(y, open);
    return true;
  }

  // Appends what stays open to open_, which holds `open` pixels already; returns how many it holds then.
  int64_t few_queries_row(int64_t y, int64_t row, int64_t open) {
    strip_.sigmoids(choice_.chosen(), choice_.count(), y, sigmoids_);
    int32_t labels[kStrip];
    for (int64_t j = 0; j < width_; j += kMixPixels) {
      RoughBestTwo best(choice_.tag_mask());
      mix_classes(table_, choice_.chosen(), choice_.count(), choice_.rest(), sigmoids_ + j, kStrip, best);
      for (int v = 0; v < kMixVectors; ++v) {
        const int64_t column = j + v * kLanes;
        store(labels + column, bits(best.best[v]) & best.tag_mask);
        const vint certain = best.best[v] - best.second[v] > choice_.doubt(best.best[v]);
        uint32_t doubtful = lane_bits(certain) ^ ((uint32_t{1} << kLanes) - 1);
        for (; doubtful != 0; doubtful &= doubtful - 1) {
          const int64_t at = column + __builtin_ctz(doubtful);
          if (at < width_) open_[open++] = static_cast<int32_t>(row * kStrip + at);
        }
      }
    }
    write_labels(y, labels);
    return open;
  }

  // Computes the sigmoids of all queries at the pixels in open_, and decides them when they fill a strip.
  void keep_doubtful(int64_t y, int64_t open) {
    for (int64_t begin = 0, count; begin < open; begin += count) {
      count = open - begin < kLanes ? open - begin : kLanes;
      if (count > kStrip - doubtful_) count = kStrip - doubtful_;
      int32_t rows[kLanes], columns[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int32_t place = open_[i < count ? begin + i : begin];
        rows[i] = static_cast<int32_t>(y + place / kStrip);
        columns[i] = static_cast<int32_t>(place % kStrip);
      }
      strip_.sigmoids_at(load(rows), load(columns), doubtful_sigmoids_ + doubtful_, kDoubtfulStride);
      for (int64_t i = 0; i < count; ++i) doubtful_at_[doubtful_ + i] = rows[i] * maps_.width + left_ + columns[i];
      doubtful_ += count;
      if (doubtful_ == kStrip) decide_doubtful();
    }
  }

  void decide_doubtful() {
    for (int64_t j = 0; j < doubtful_; j += kMixPixels) {
      BestClass best;
      mix_classes(table_, all_, table_.queries, nullptr, doubtful_sigmoids_ + j, kDoubtfulStride, best);
      int32_t labels[kMixPixels];
      memcpy(labels, best.label, sizeof best.label);
      for (int64_t i = 0; i < kMixPixels && j + i < doubtful_; ++i) write_label(doubtful_at_[j + i], labels[i]);
    }
    doubtful_ = 0;
  }

  void write_labels(int64_t y, const int32_t* labels) {
    const int64_t at = y * maps_.width + left_;
    switch (maps_.label_bytes) {
      case 1:
        convert_labels(labels, width_, static_cast<uint8_t*>(maps_.labels) + at);
        break;
      case 2:
        convert_labels(labels, width_, static_cast<int16_t*>(maps_.labels) + at);
        break;
      default:
        convert_labels(labels, width_, static_cast<int32_t*>(maps_.labels) + at);
    }
  }

  void write_label(int64_t at, int32_t label) {
    switch (maps_.label_bytes) {
      case 1:
        static_cast<uint8_t*>(maps_.labels)[at] = static_cast<uint8_t>(label);
        break;
      case 2:
        static_cast<int16_t*>(maps_.labels)[at] = static_cast<int16_t>(label);
        break;
      default:
        static_cast<int32_t*>(maps_.labels)[at] = label;
    }
  }

  const ClassTable& table_;
  const SemanticMaps& maps_;
  const float* cells_;
  const int64_t left_, width_;
  MaskStrip strip_;
  QueryChoice choice_;
  int32_t* all_;              // 0, 1, ..., N-1
  float* sigmoids_;           // [N, kStrip]
  float* doubtful_sigmoids_;  // [N, kDoubtfulStride]
  int64_t doubtful_at_[kStrip];
  int64_t doubtful_ = 0;
  int32_t open_[kTileRows * kStrip];  // row of the tile * kStrip + column
  int64_t pause_ = 0, next_pause_ = 1;
};

}  // namespace

ClassTable make_class_table(const float* probabilities, int64_t queries, int64_t classes, float* memory) {
  const int64_t padded = to_full_vectors(classes);
  float* block = memory;
  float* rows = memory + queries * classes;
  float* peaks = rows + queries * padded;
  for_each_class_block(classes, [&](int64_t k, int64_t count) {
    for (int64_t n = 0; n < queries; ++n) {
      for (int64_t r = 0; r < count; ++r) *block++ = probabilities[n * classes + k + r];
    }
  });
  for (int64_t n = 0; n < to_full_vectors(queries); ++n) peaks[n] = 0.0f;
  for (int64_t n = 0; n < queries; ++n) {
    for (int64_t k = 0; k < padded; ++k) {
      const float p = k < classes ? probabilities[n * classes + k] : 0.0f;
      rows[n * padded + k] = p;
      peaks[n] = p > peaks[n] ? p : peaks[n];
    }
  }
  return {queries, classes, memory, rows, peaks};
}

int64_t semantic_cells(const MaskPlanes& planes, int64_t n, const Taps& columns, float* cells, float* scratch) {
  const int64_t strips = columns.stride / kStrip, padded = to_full_vectors(planes.queries);
  int64_t nans = 0;
  for (int64_t row = 0; row < planes.rows; ++row) {
    nans += load_bounded(planes, n, row, 0, planes.columns, scratch);
    if (cells == nullptr) continue;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int32_t* first = columns.index + strip * kStrip;
      const int64_t begin = *first, end = first[(columns.taps - 1) * columns.stride + kStrip - 1] + 1;
      vfloat most = splat(-kLogitBound);
      int64_t j = begin;
      for (; j + kLanes <= end; j += kLanes) most = maximum(most, load(scratch + j));
      float largest = -kLogitBound;
      for (; j < end; ++j) largest = scratch[j] > largest ? scratch[j] : largest;
      for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
      cells[(row * strips + strip) * padded + n] = largest;
    }
  }
  return nans;
}

void semantic_strip(const MaskPlanes& planes, const ClassTable& table, const Taps& rows, const Taps& columns,
                    int64_t strip, int64_t begin, int64_t end, const float* cells, const SemanticMaps& maps,
                    float* scratch) {
  StripInference(planes, table, rows, columns, strip, cells, maps, Scratch(scratch)).run(begin, end);
}

}  // namespace fastmask::FASTMASK_SIMD
