#include "cpu/class_mix.h"
#include "cpu/label_map.h"
#include "cpu/mask_strip.h"
#include "cpu/semantic.h"
#include "cpu/strip_columns.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Scores at the valid grid, [rows, classes, columns].
struct GridScores {
  const float* scores;
  int64_t classes, columns;

  const float* row(int64_t y, int64_t k) const { return scores + (y * classes + k) * columns; }
};

// Gives consumer.take(k, scores) the resampled scores of the pixels [j, j + kMixPixels) of a strip at row y.
template <class Consumer>
inline void resample_scores(const GridScores& grid, const Taps& rows, const StripColumns& columns, int64_t y, int64_t j,
                            float* values, Consumer& consumer) {
  const int64_t first = columns.first(j), end = columns.last(j + kMixPixels - 1) + 1;
  const int64_t offset = columns.left() + first;
  for (int64_t k = 0; k < grid.classes; ++k) {
    for (int64_t i = 0; i < end - first; i += kLanes) {
      vfloat x = load(grid.row(rows.index[y], k) + offset + i) * rows.weight[y];
      for (int t = 1; t < rows.taps; ++t) {
        const int64_t at = t * rows.stride + y;
        x = fma(load(grid.row(rows.index[at], k) + offset + i), splat(rows.weight[at]), x);
      }
      store(values + first + i, x);
    }
    vfloat pixels[1][kMixVectors];
    for (int v = 0; v < kMixVectors; ++v) pixels[0][v] = columns.apply(values, j + v * kLanes);
    consumer.take(k, pixels);
  }
}

}  // namespace

void semantic_grid_scores(const PackedLogits& packed, const ClassTable& table, const Taps& rows, const Taps& columns,
                          float* scores, float* memory) {
  Scratch scratch(memory);
  float* sigmoids = scratch.take(packed.queries * kStrip);
  int32_t* all = scratch.take<int32_t>(to_full_vectors(packed.queries));
  for (int64_t n = 0; n < packed.queries; ++n) all[n] = static_cast<int32_t>(n);
  for (int64_t strip = 0; strip < columns.stride / kStrip; ++strip) {
    Scratch rest = scratch;
    MaskStrip mask_strip(packed, rows, columns, strip, rest);
    for (int64_t y = 0; y < rows.out; ++y) {
      mask_strip.go_to(y);
      mask_strip.sigmoids(all, packed.queries, y, sigmoids);
      for (int64_t j = 0; j < kStrip; j += kMixPixels) {
        StoreScores row{scores + y * table.classes * columns.stride + strip * kStrip + j, columns.stride, kMixPixels};
        mix_classes(table, all, packed.queries, nullptr, sigmoids + j, kStrip, row);
      }
    }
  }
}

void semantic_resample_scores(const float* scores, int64_t classes, int64_t grid_columns, const Taps& rows,
                              const Taps& columns, int64_t top, int64_t left, const SemanticMaps& maps, float* memory) {
  const GridScores grid{scores, classes, grid_columns};
  for (int64_t strip = 0; strip < columns.stride / kStrip; ++strip) {
    const StripColumns strip_columns(columns, strip);
    const int64_t width = columns.out - strip * kStrip < kStrip ? columns.out - strip * kStrip : kStrip;
    for (int64_t y = 0; y < rows.out; ++y) {
      const int64_t at = (top + y) * maps.width + left + strip * kStrip;
      int32_t labels[kStrip];
      for (int64_t j = 0; j < width; j += kMixPixels) {
        const int64_t count = width - j < kMixPixels ? width - j : kMixPixels;
        if (maps.scores != nullptr) {
          StoreScores out{maps.scores + at + j, maps.rows * maps.width, count};
          resample_scores(grid, rows, strip_columns, y, j, memory, out);
        } else if (maps.score != nullptr) {
          BestTwoClasses best;
          resample_scores(grid, rows, strip_columns, y, j, memory, best);
          memcpy(labels + j, best.label, sizeof best.label);
          best.write(classes, count, maps.score + at + j, maps.margin + at + j);
        } else {
          BestClass best;
          resample_scores(grid, rows, strip_columns, y, j, memory, best);
          memcpy(labels + j, best.label, sizeof best.label);
        }
      }
      if (maps.labels != nullptr) write_labels(maps, at, labels, width);
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
