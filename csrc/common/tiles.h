// Results are computed in tiles of pixels. This file holds the inputs and weights of a tile's rows and columns.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/carver.h"
#include "common/logits.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 64;

// Outputs of one axis, each a sum over t < taps of inputs[slot[t * stride + i]] * weight[t * stride + i].
struct AxisTile {
  int64_t begin, count;  // the first output, and how many
  int64_t stride;  // count, rounded up to full vectors; weights beyond count are NaN, so that no pixel counts there
  int64_t inputs;  // the number of inputs
  const int32_t* input;  // [inputs], ascending
  const int32_t* slot;   // [taps, stride], indices into `input`
  const float* weight;   // [taps, stride]
  int taps;              // 1..kMaxTaps
};

// The tiles of an axis, with `length` outputs each except the last.
class AxisTiles {
 public:
  // `dense` lists all inputs from the first to the last that a tile reads, so that they can be loaded at once.
  AxisTiles(const Taps& taps, int64_t length, bool dense);

  // For each tile of `outer`, a tile whose outputs are the inputs of that tile; the first output in `taps` is `origin`.
  AxisTiles(const Taps& taps, const AxisTiles& outer, int64_t origin, bool dense);

  int64_t size() const { return static_cast<int64_t>(tiles_.size()); }
  AxisTile operator[](int64_t i) const;
  int64_t most_inputs() const { return most_inputs_; }
  int64_t most_outputs() const { return most_outputs_; }

 private:
  struct Tile {
    int64_t begin, count;
    std::vector<int32_t> input, slot;
    std::vector<float> weight;
  };

  void add(const Taps& taps, int64_t begin, const std::vector<int32_t>& outputs, bool dense);

  int taps_;
  int64_t most_inputs_ = 0, most_outputs_ = 0;
  std::vector<Tile> tiles_;
};

// How a tile of the result is computed: directly from logits, or from logits to probabilities to the result.
struct TilePlan {
  AxisTile rows, columns;              // from logits, or from probabilities
  bool probabilities;                  // whether there are two steps
  AxisTile inner_rows, inner_columns;  // from logits to the inputs of the sigmoid
};

class TilePlans;

// Memory for one tile.
struct TileWorkspace {
  float* piece;   // a row of inputs
  float* rows;    // the rows of inputs, resampled along the columns
  float* inner;   // the same for the first of two steps
  float* values;  // [kTileRows, kTileColumns] of the result

  void lay_out(Carver& carver, const TilePlans& plans);
};

// The lowest and the highest logit of each of a map's w columns, in the rows that a band of tiles reads.
struct BandBounds {
  float *low, *high;
  float* row;  // for a row of logits

  void lay_out(Carver& carver, int64_t w) {
    for (float** values : {&low, &high, &row}) carver.take(*values, to_full_vectors(w));
  }
};

// All tiles of a result.
class TilePlans {
 public:
  // From logits, by the composition of both steps.
  TilePlans(const Taps& rows, const Taps& columns);

  // From logits to probabilities to the result, with inner rows from `inner_top` on.
  TilePlans(const Taps& rows, const Taps& columns, const Taps& inner_rows, int64_t inner_top,
            const Taps& inner_columns);

  int64_t bands() const { return rows_.size(); }
  int64_t columns() const { return columns_.size(); }
  TilePlan plan(int64_t band, int64_t column) const;

  // Those of a band's tiles, from left to right.
  std::vector<TilePlan> band(int64_t band) const;

 private:
  friend struct TileWorkspace;

  AxisTiles rows_, columns_;
  std::optional<AxisTiles> inner_rows_, inner_columns_;
};

}  // namespace fastmask
