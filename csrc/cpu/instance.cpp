#include "cpu/instance.h"

#include "cpu/tile.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

static_assert(kTileColumns == 64, "a row of a tile is one word");

// Unpacks bits to bytes of 0 and 1: each of eight copies keeps one bit, which the sum carries to its highest bit.
uint64_t spread_bits(uint64_t bits) {
  const uint64_t own = ((bits & 0xff) * 0x0101010101010101u) & 0x8040201008040201u;
  return ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

void write_row(uint64_t word, int64_t count, bool packed, uint8_t* out) {
  if (packed) {
    memcpy(out, &word, ceil_div(count, 8));
    return;
  }
  for (int64_t j = 0; j < count; j += 8) {
    const uint64_t bytes = spread_bits(word >> j);
    memcpy(out + j, &bytes, count - j < 8 ? count - j : 8);
  }
}

void instance_tile(const Plane& plane, const TilePlan& plan, const TileWorkspace& work, const MaskRows& mask,
                   InstanceSums& sums) {
  const int64_t columns = plan.columns.count, left = plan.columns.begin, top = plan.rows.begin;
  uint8_t* out = mask.data + top * mask.row_bytes + (mask.packed ? left / 8 : left);
  resample_tile(plane, plan, work);
  uint64_t any = 0;
  for (int64_t i = 0; i < plan.rows.count; ++i) {
    uint64_t word = 0;
    vfloat foreground = {};  // of one row: equal terms round alike, so long sums would drift
    for (int64_t j = 0; j < plan.columns.stride; j += kLanes) {
      const vfloat x = load(work.values + i * plan.columns.stride + j);
      const vint inside = x > 0.0f;
      const uint32_t bits = lane_bits(inside);
      if (bits == 0) continue;
      word |= static_cast<uint64_t>(bits) << j;
      foreground += inside ? probability(x) : vfloat{};
    }
    if (word == 0) continue;
    write_row(word, columns, mask.packed, out + i * mask.row_bytes);
    any |= word;
    sums.foreground += sum_lanes(foreground);
    sums.area += __builtin_popcountll(word);
    sums.top = top + i < sums.top ? top + i : sums.top;
    sums.bottom = top + i + 1 > sums.bottom ? top + i + 1 : sums.bottom;
  }
  if (any == 0) return;
  const int64_t first = left + __builtin_ctzll(any), end = left + 64 - __builtin_clzll(any);
  sums.left = first < sums.left ? first : sums.left;
  sums.right = end > sums.right ? end : sums.right;
}

}  // namespace

void instance_band(const Plane& plane, const TilePlan* plans, int64_t columns, const InstanceWorkspace& work,
                   const MaskRows& mask, InstanceSums& sums) {
  find_band_bounds(plane, plans[0], work.bounds);
  memset(mask.data + plans[0].rows.begin * mask.row_bytes, 0, plans[0].rows.count * mask.row_bytes);
  for (int64_t column = 0; column < columns; ++column) {
    if (range_of_tile(plans[column], work.bounds).high > 0) {
      instance_tile(plane, plans[column], work.tile, mask, sums);
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
