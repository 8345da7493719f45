#include "cpu/semantic_mix.h"
#include "cpu/semantic_strip.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Scores at the valid grid, [rows, classes, columns].
struct GridScores {
  const float* scores;
  int64_t classes, columns;

  const float* row(int64_t y, int64_t k) const { return scores + (y * classes + k) * columns; }
};

// Calls consumer.take(k, scores) with the resampled scores of the pixels [j, j + kMixPixels) of a strip at row y.
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
                          float* scores, const SemanticWorkspace& work) {
  for (int64_t n = 0; n < packed.queries; ++n) work.all[n] = static_cast<int32_t>(n);
  for (int64_t strip = 0; strip < columns.stride / kStrip; ++strip) {
    MaskStrip mask_strip(packed, rows, columns, strip, work.strip);
    for (int64_t y = 0; y < rows.out; ++y) {
      mask_strip.go_to(y);
      mask_strip.sigmoids(work.all, packed.queries, y, work.sigmoids);
      for (int64_t j = 0; j < kStrip; j += kMixPixels) {
        StoreScores row{scores + y * table.classes * columns.stride + strip * kStrip + j, columns.stride, kMixPixels};
        mix_classes(table, work.all, packed.queries, nullptr, work.sigmoids + j, kStrip, row);
      }
    }
  }
}

void semantic_resample_scores(const float* scores, int64_t classes, int64_t grid_columns, const Taps& rows,
                              const Taps& columns, int64_t top, int64_t left, const SemanticMaps& maps, float* row) {
  const GridScores grid{scores, classes, grid_columns};
  for (int64_t strip = 0; strip < columns.stride / kStrip; ++strip) {
    const StripColumns strip_columns(columns, strip);
    const int64_t width = columns.out - strip * kStrip < kStrip ? columns.out - strip * kStrip : kStrip;
    for (int64_t y = 0; y < rows.out; ++y) {
      const int64_t at = (top + y) * maps.width + left + strip * kStrip;
      write_row(maps, classes, at, width,
                [&](int64_t j, auto& consumer) { resample_scores(grid, rows, strip_columns, y, j, row, consumer); });
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
