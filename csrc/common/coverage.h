// Which targets cover which of the h x w pixels.
//
// The pixels of a row of mask logits are divided into chunks of 16, and these into blocks. An entry says which lanes of
// one chunk belong to one target, so the sums of the mask cost take one masked addition for each chunk and target found
// there: their cost grows with the covered area and the length of the outlines, not with the number of targets.
// Overlapping masks need no other form. One list serves all layers and queries of the image.
#pragma once

#include <cstdint>
#include <vector>

#include "common/targets.h"

namespace fastmask {

constexpr int64_t kChunk = 16;
constexpr int64_t kCoverageChunks = 64;  // of a block

struct CoverageEntry {
  int32_t chunk;
  int32_t target;
  int32_t lanes;  // bit i: pixel 16 * chunk + i belongs to the target
};

// Plain pointers for the kernels, whose SIMD levels must not share inline functions of the standard library.
struct CoverageView {
  const CoverageEntry* entries;  // by block, then by target, then by chunk
  int64_t num_entries;
  const int32_t* valid;  // [chunks] lanes that count: neither void nor beyond h * w
  const float* areas;    // [targets] counted pixels of each target
  int64_t targets;
  int64_t pixels;  // counted pixels
};

struct Coverage {
  std::vector<CoverageEntry> entries;
  std::vector<int32_t> valid;
  std::vector<float> areas;
  int64_t pixels = 0;

  CoverageView view() const {
    return {entries.data(), static_cast<int64_t>(entries.size()), valid.data(),
            areas.data(),   static_cast<int64_t>(areas.size()),   pixels};
  }
};

// Samples, for each of h x w pixels, the targets at the nearest of their H x W pixels: band `band` of `bands`, whose
// `valid` has only its own chunks. A band consists of whole blocks.
Coverage make_coverage(const ImageTargets& targets, int64_t h, int64_t w, int64_t band, int64_t bands);

// The whole from its bands, of which there is at least one.
Coverage join_bands(Coverage* bands, int64_t count);

}  // namespace fastmask
