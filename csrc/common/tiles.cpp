#include "common/tiles.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fastmask {

AxisTiles::AxisTiles(const Taps& taps, int64_t length, bool dense) : taps_(taps.taps) {
  for (int64_t begin = 0; begin < taps.out; begin += length) {
    std::vector<int32_t> outputs(std::min(length, taps.out - begin));
    std::iota(outputs.begin(), outputs.end(), static_cast<int32_t>(begin));
    add(taps, begin, outputs, dense);
  }
}

AxisTiles::AxisTiles(const Taps& taps, const AxisTiles& outer, int64_t origin, bool dense) : taps_(taps.taps) {
  for (const Tile& tile : outer.tiles_) {
    std::vector<int32_t> outputs(tile.input);
    for (int32_t& output : outputs) output -= static_cast<int32_t>(origin);
    add(taps, outputs.front(), outputs, dense);
  }
}

void AxisTiles::add(const Taps& taps, int64_t begin, const std::vector<int32_t>& outputs, bool dense) {
  const int64_t count = static_cast<int64_t>(outputs.size()), stride = to_full_vectors(count);
  Tile tile{begin, count, {}, {}, {}};
  for (const int32_t output : outputs) {
    for (int t = 0; t < taps.taps; ++t) tile.input.push_back(taps.index[t * taps.stride + output]);
  }
  std::sort(tile.input.begin(), tile.input.end());
  tile.input.erase(std::unique(tile.input.begin(), tile.input.end()), tile.input.end());
  if (dense) {
    const int32_t first = tile.input.front(), last = tile.input.back();
    tile.input.resize(last - first + 1);
    std::iota(tile.input.begin(), tile.input.end(), first);
  }
  tile.slot.assign(taps.taps * stride, 0);
  tile.weight.assign(taps.taps * stride, std::numeric_limits<float>::quiet_NaN());
  for (int t = 0; t < taps.taps; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = t * taps.stride + outputs[i];
      const auto at = std::lower_bound(tile.input.begin(), tile.input.end(), taps.index[from]);
      tile.slot[t * stride + i] = static_cast<int32_t>(at - tile.input.begin());
      tile.weight[t * stride + i] = taps.weight[from];
    }
  }
  most_inputs_ = std::max(most_inputs_, static_cast<int64_t>(tile.input.size()));
  most_outputs_ = std::max(most_outputs_, count);
  tiles_.push_back(std::move(tile));
}

AxisTile AxisTiles::operator[](int64_t i) const {
  const Tile& tile = tiles_[i];
  return {tile.begin,        tile.count,       to_full_vectors(tile.count), static_cast<int64_t>(tile.input.size()),
          tile.input.data(), tile.slot.data(), tile.weight.data(),          taps_};
}

TilePlans::TilePlans(const Taps& rows, const Taps& columns)
    : rows_(rows, kTileRows, false), columns_(columns, kTileColumns, true) {}

TilePlans::TilePlans(const Taps& rows, const Taps& columns, const Taps& inner_rows, int64_t inner_top,
                     const Taps& inner_columns)
    : rows_(rows, kTileRows, false),
      columns_(columns, kTileColumns, true),
      inner_rows_(std::in_place, inner_rows, rows_, inner_top, false),
      inner_columns_(std::in_place, inner_columns, columns_, 0, true) {}

TilePlan TilePlans::plan(int64_t band, int64_t column) const {
  TilePlan plan{rows_[band], columns_[column], inner_rows_.has_value(), {}, {}};
  if (plan.probabilities) {
    plan.inner_rows = (*inner_rows_)[band];
    plan.inner_columns = (*inner_columns_)[column];
  }
  return plan;
}

std::vector<TilePlan> TilePlans::band(int64_t band) const {
  std::vector<TilePlan> tiles;
  for (int64_t column = 0; column < columns(); ++column) tiles.push_back(plan(band, column));
  return tiles;
}

void TileWorkspace::lay_out(Carver& carver, const TilePlans& plans) {
  int64_t longest = plans.columns_.most_inputs(), inner_size = 0;
  if (plans.inner_rows_.has_value()) {
    const int64_t width = to_full_vectors(plans.inner_columns_->most_outputs());
    longest = std::max({longest, plans.inner_columns_->most_inputs(), width});
    inner_size = plans.inner_rows_->most_inputs() * width;
  }
  carver.take(piece, to_full_vectors(longest) + 32);  // look_up() may read 32 floats
  carver.take(rows, plans.rows_.most_inputs() * kTileColumns);
  carver.take(inner, inner_size);
  carver.take(values, kTileRows * kTileColumns);
}

}  // namespace fastmask
