// Products of small tiles, kept in registers, for attention over blocks of kAttentionKeys keys.
#pragma once

#include "cpu/masked_attention.h"
#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

constexpr int64_t kKeys = kAttentionKeys;
constexpr int kParts = kKeys / kLanes;
constexpr int kGroup = kRegisters / 4;  // rows whose sums fit in registers, two vectors each

static inline float largest_lane(vfloat v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// Channels are summed in chains of this many, then the chains: rounding grows with the longest chain of additions.
constexpr int64_t kChain = 16;

// out[g][s] = sum over c of rows[offsets[g] + c] * columns[c][s], for the kKeys keys s.
template <int G>
static inline void tile_products(const float* rows, const int32_t* offsets, const float* columns, int64_t channels,
                                 float* out) {
  const float* row[G];
  for (int g = 0; g < G; ++g) row[g] = rows + offsets[g];
  for (int64_t s = 0; s < kKeys; s += 2 * kLanes) {
    for (int64_t first = 0; first < channels; first += kChain) {
      const int64_t last = first + kChain < channels ? first + kChain : channels;
      vfloat sums[G][2] = {};
      for (int64_t c = first; c < last; ++c) {
        const vfloat left = load(columns + c * kKeys + s), right = load(columns + c * kKeys + s + kLanes);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          const vfloat x = splat(row[g][c]);
          sums[g][0] = fma(x, left, sums[g][0]);
          sums[g][1] = fma(x, right, sums[g][1]);
        }
      }
      for (int g = 0; g < G; ++g) {
        float* at = out + g * kKeys + s;
        store(at, first == 0 ? sums[g][0] : load(at) + sums[g][0]);
        store(at + kLanes, first == 0 ? sums[g][1] : load(at + kLanes) + sums[g][1]);
      }
    }
  }
}

// The sum over c of a[c] * b[c], rounded as tile_products rounds it.
static inline float product(const float* a, const float* b, int64_t channels) {
  vfloat total = {};
  for (int64_t first = 0; first < channels; first += kChain) {
    const int64_t last = first + kChain < channels ? first + kChain : channels;
    vfloat sum = {};
    for (int64_t c = first; c < last; ++c) sum = fma(splat(a[c]), splat(b[c]), sum);
    total = total + sum;
  }
  return total[0];
}

// out[out_offsets[g] + c] += sum over r < count of weights[g * out_step + r * row_step] * rows[offsets[r] + c], for V
// vectors of channels c. The sum is computed separately and added once, so that rounding grows only with the number of
// tiles.
template <int G, int V>
static inline void combine_vectors(const float* weights, int64_t out_step, int64_t row_step, const float* rows,
                                   const int32_t* offsets, int64_t count, float* out, const int32_t* out_offsets) {
  vfloat sums[G][V] = {};
  for (int64_t r = 0; r < count; ++r) {
    vfloat row[V];
    for (int v = 0; v < V; ++v) row[v] = load(rows + offsets[r] + v * kLanes);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const vfloat weight = splat(weights[g * out_step + r * row_step]);
      for (int v = 0; v < V; ++v) sums[g][v] = fma(weight, row[v], sums[g][v]);
    }
  }
  for (int g = 0; g < G; ++g) {
    float* at = out + out_offsets[g];
    for (int v = 0; v < V; ++v) store(at + v * kLanes, load(at + v * kLanes) + sums[g][v]);
  }
}

// The same for `channels` channels, a multiple of kLanes.
template <int G>
static inline void tile_combine(const float* weights, int64_t out_step, int64_t row_step, const float* rows,
                                const int32_t* offsets, int64_t count, float* out, const int32_t* out_offsets,
                                int64_t channels) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    combine_vectors<G, 2>(weights, out_step, row_step, rows + c, offsets, count, out + c, out_offsets);
  }
  if (c < channels) {
    combine_vectors<G, 1>(weights, out_step, row_step, rows + c, offsets, count, out + c, out_offsets);
  }
}

// Calls run.operator()<G>(first) for groups of G that cover 0..count, the largest first. The size of a group changes no
// result, because each row is summed separately.
template <typename Run>
static inline void for_groups(int64_t count, const Run& run) {
  int64_t first = 0;
  for (; first + kGroup <= count; first += kGroup) run.template operator()<kGroup>(first);
  for (; first + 4 <= count; first += 4) run.template operator()<4>(first);
  for (; first + 2 <= count; first += 2) run.template operator()<2>(first);
  if (first < count) run.template operator()<1>(first);
}

// columns[c][s] = rows[s][c] for kKeys rows of `stride` floats, a multiple of kLanes.
static inline void transpose_rows(const float* rows, int64_t stride, float* columns) {
  for (int64_t s = 0; s < kKeys; s += kLanes) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      vfloat tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load(rows + (s + i) * stride + c);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(columns + (c + i) * kKeys + s, tile[i]);
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
