#include "common/coverage.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "common/taps.h"

namespace fastmask {

namespace {

// Bit i of the result: holds(sources[i]), for up to kChunk pixels.
template <class Holds>
int32_t lanes_where(const int64_t* sources, int64_t count, const Holds& holds) {
  uint32_t lanes = 0;
  if (count >= kChunk) {
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) lanes |= static_cast<uint32_t>(holds(sources[i])) << i;
  } else {
    for (int64_t i = 0; i < count; ++i) lanes |= static_cast<uint32_t>(holds(sources[i])) << i;
  }
  return static_cast<int32_t>(lanes);
}

}  // namespace

Coverage make_coverage(const ImageTargets& targets, int64_t h, int64_t w, int64_t band, int64_t bands) {
  constexpr int64_t kBlock = kCoverageChunks * kChunk;
  const int64_t pixels = h * w;
  const int64_t blocks = ceil_div(pixels, kBlock);
  const std::vector<int64_t> rows = nearest_taps(targets.height, h);
  const std::vector<int64_t> columns = nearest_taps(targets.width, w);

  Coverage coverage;
  coverage.areas.assign(targets.count, 0.0f);
  std::vector<int64_t> sources(kBlock);
  std::vector<int32_t> lanes(targets.count * kCoverageChunks);  // of each target in the chunks of a block
  for (int64_t block = blocks * band / bands; block < blocks * (band + 1) / bands; ++block) {
    const int64_t begin = block * kBlock, count = std::min(kBlock, pixels - begin), chunks = ceil_div(count, kChunk);
    for (int64_t i = 0, y = begin / w, x = begin % w; i < count; ++i) {
      sources[i] = rows[y] * targets.width + columns[x];
      if (++x == w) {
        x = 0;
        ++y;
      }
    }
    const auto find_lanes = [&](int32_t* lanes_of, const auto& holds) {
      for (int64_t c = 0; c < chunks; ++c) {
        lanes_of[c] = lanes_where(&sources[c * kChunk], count - c * kChunk, holds);
      }
    };
    int32_t valid[kCoverageChunks];
    find_lanes(valid, [&](int64_t pixel) { return counts_pixel(targets, pixel); });
    coverage.valid.insert(coverage.valid.end(), valid, valid + chunks);
    for (int64_t c = 0; c < chunks; ++c) coverage.pixels += std::popcount(static_cast<uint32_t>(valid[c]));

    if (targets.segments != nullptr) {
      std::fill(lanes.begin(), lanes.end(), 0);
      with_segments(targets, [&](const auto* segments) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t target = segments[sources[i]];
          if (target >= 0 && target < targets.count) lanes[target * kCoverageChunks + i / kChunk] |= 1 << i % kChunk;
        }
      });
    } else {
      for (int64_t target = 0; target < targets.count; ++target) {
        const uint8_t* mask = targets.masks + target * targets.height * targets.width;
        // The rows that are read are too far apart for the processor to foresee.
        const uint8_t* next = target + 1 < targets.count ? mask + targets.height * targets.width : mask;
        for (int64_t c = 0; c < chunks; ++c) __builtin_prefetch(next + sources[c * kChunk]);
        find_lanes(&lanes[target * kCoverageChunks], [mask](int64_t pixel) { return mask[pixel] != 0; });
      }
    }
    for (int64_t target = 0; target < targets.count; ++target) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int32_t covered = lanes[target * kCoverageChunks + c] & valid[c];
        if (covered == 0) continue;
        coverage.areas[target] += static_cast<float>(std::popcount(static_cast<uint32_t>(covered)));
        const int64_t chunk = block * kCoverageChunks + c;
        coverage.entries.push_back({static_cast<int32_t>(chunk), static_cast<int32_t>(target), covered});
      }
    }
  }
  return coverage;
}

Coverage join_bands(Coverage* bands, int64_t count) {
  Coverage whole = std::move(bands[0]);
  for (const Coverage* band = bands + 1; band != bands + count; ++band) {
    whole.entries.insert(whole.entries.end(), band->entries.begin(), band->entries.end());
    whole.valid.insert(whole.valid.end(), band->valid.begin(), band->valid.end());
    for (size_t m = 0; m < whole.areas.size(); ++m) whole.areas[m] += band->areas[m];
    whole.pixels += band->pixels;
  }
  return whole;
}

}  // namespace fastmask
