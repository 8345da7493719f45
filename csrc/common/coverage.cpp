#include "common/coverage.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "common/taps.h"

namespace fastmask {

Coverage make_coverage(const ImageTargets& targets, int64_t h, int64_t w, int64_t band, int64_t bands) {
  const int64_t pixels = h * w;
  const int64_t chunks = ceil_div(pixels, kChunk);
  const int64_t first_chunk = chunks * band / bands, last_chunk = chunks * (band + 1) / bands;
  const std::vector<int64_t> rows = nearest_taps(targets.height, h);
  const std::vector<int64_t> columns = nearest_taps(targets.width, w);

  Coverage coverage;
  coverage.valid.resize(last_chunk - first_chunk);
  coverage.areas.assign(targets.count, 0.0f);
  std::vector<int32_t> lanes_of(targets.count, 0);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    int64_t sources[kChunk];
    const int64_t begin = chunk * kChunk;
    const int lanes = static_cast<int>(std::min(kChunk, pixels - begin));
    int32_t valid = 0;
    for (int i = 0; i < lanes; ++i) {
      const int64_t pixel = begin + i;
      sources[i] = rows[pixel / w] * targets.width + columns[pixel % w];
      valid |= static_cast<int32_t>(counts_pixel(targets, sources[i])) << i;
    }
    coverage.valid[chunk - first_chunk] = valid;
    coverage.pixels += std::popcount(static_cast<uint32_t>(valid));

    const auto add = [&](int64_t target, int32_t covered) {
      if (covered == 0) return;
      coverage.areas[target] += static_cast<float>(std::popcount(static_cast<uint32_t>(covered)));
      coverage.entries.push_back({static_cast<int32_t>(chunk), static_cast<int32_t>(target), covered});
    };
    if (targets.segments != nullptr) {
      int64_t found[kChunk];
      int num_found = 0;
      for (int i = 0; i < lanes; ++i) {
        const int64_t target = segment_at(targets, sources[i]);
        if (target < 0 || target >= targets.count) continue;
        if (lanes_of[target] == 0) found[num_found++] = target;
        lanes_of[target] |= 1 << i;
      }
      std::sort(found, found + num_found);
      for (int k = 0; k < num_found; ++k) {
        add(found[k], lanes_of[found[k]] & valid);
        lanes_of[found[k]] = 0;
      }
    } else {
      for (int64_t target = 0; target < targets.count; ++target) {
        const uint8_t* mask = targets.masks + target * targets.height * targets.width;
        int32_t covered = 0;
        for (int i = 0; i < lanes; ++i) covered |= static_cast<int32_t>(mask[sources[i]] != 0) << i;
        add(target, covered & valid);
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
