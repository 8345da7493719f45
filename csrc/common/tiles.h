// Results are made in tiles of pixels; what one tile of rows or of columns is made of.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/dtype.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 64;

static constexpr int64_t padded_to_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Outputs of one axis, each a sum over t < taps of inputs[slot[t * stride + i]] * weight[t * stride + i].
struct AxisTile {
  int64_t begin, count;  // the first output, and how many
  int64_t stride;        // count, up to full vectors; weights beyond count are NaN, so that nothing counts there
  int64_t inputs;        // how many inputs there are
  const int32_t* input;  // [inputs], rising
  const int32_t* slot;   // [taps, stride], which of the inputs
  const float* weight;   // [taps, stride]
  int taps;              // 1..kMaxTaps
};

// The tiles of an axis, of `length` outputs each but for the last.
class AxisTiles {
 public:
  // `dense` lists all inputs from the first to the last that a tile reads, so that they can be loaded at once.
  AxisTiles(const Taps& taps, int64_t length, bool dense);

  // For each tile of `outer`, the outputs that its inputs are; output `origin` is the first that `taps` has.
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

// The logits of one query: row y of those given begins at element offset + y * row_stride.
struct Plane {
  const void* logits;
  int64_t offset, row_stride;
  Dtype dtype;
};

// How a tile of the result is made of logits: in one go, or logits to probabilities to the result.
struct TilePlan {
  AxisTile rows, columns;              // from logits, or from probabilities
  bool probabilities;                  // whether there are two steps
  AxisTile inner_rows, inner_columns;  // from logits to what the sigmoid is taken of
};

// Floats of scratch memory for one tile: a row of inputs, the rows of inputs resampled along the columns, and the same
// of the first of two steps.
struct TileScratchSizes {
  int64_t piece, rows, inner;

  constexpr int64_t total() const { return piece + rows + inner; }
};

// All tiles of a result.
class TilePlans {
 public:
  // From logits, by the composition of both steps.
  TilePlans(const Taps& rows, const Taps& columns);

  // From logits to probabilities and on, for inner rows from `inner_top` on.
  TilePlans(const Taps& rows, const Taps& columns, const Taps& inner_rows, int64_t inner_top,
            const Taps& inner_columns);

  int64_t bands() const { return rows_.size(); }
  int64_t columns() const { return columns_.size(); }
  TilePlan plan(int64_t band, int64_t column) const;
  TileScratchSizes scratch() const;

 private:
  AxisTiles rows_, columns_;
  std::optional<AxisTiles> inner_rows_, inner_columns_;
};

}  // namespace fastmask
