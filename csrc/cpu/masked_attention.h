// softmax(M + scale q k^T) v of one image (Mask2Former, arXiv:2112.01527, equation 2), and its gradient.
//
// Whether a query attends to a key is one bit, computed from the mask logits for one block of queries at a time and
// used by all heads. Keys are processed in patches of kAttentionKeys; a query skips patches in which it attends to no
// key.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/simd.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kAttentionKeys = 32;
constexpr int64_t kAttentionQueries = 128;  // at most in a block, so that a head's arrays for them fit the cache

constexpr int64_t kAttentionCache = 256 << 10;  // bytes for the arrays of the heads that are computed together

// Rows of one image from element `offset` on, `stride` elements apart; heads are adjacent in a row.
template <typename T>
struct AttentionRows {
  T* data;
  int64_t offset;
  int64_t stride;
};

struct AttentionMask {
  Plane first;             // of the first query; null data: no mask
  int64_t stride;          // elements between the planes of two queries
  Resampling resampling;   // to the key grid
  const uint8_t* padding;  // [keys], not 0 at keys that are never attended to; null: none
};

// The grid of keys in patches of kAttentionKeys: 4 rows of 8 columns, or 8 of 4 if those are fewer, where both fit.
// Regions are compact, so that they touch fewer patches than runs of as many keys.
struct AttentionPatches {
  int64_t height, width;  // of the grid
  int64_t rows, columns;  // of a patch; those on the right and at the bottom may reach beyond the grid
  int64_t across, count;  // patches side by side, and in all

  AttentionPatches() = default;
  AttentionPatches(int64_t height, int64_t width) : AttentionPatches(height, width, 8) {
    const AttentionPatches narrow(height, width, 4);
    if (narrow.count < count) *this = narrow;
  }

 private:
  AttentionPatches(int64_t height, int64_t width, int64_t most_columns) : height(height), width(width), columns(1) {
    while (columns < most_columns && columns < width) columns *= 2;
    for (rows = 1; rows < kAttentionKeys / columns && rows < height;) rows *= 2;
    columns = kAttentionKeys / rows;
    across = ceil_div(width, columns);
    count = across * ceil_div(height, rows);
  }
};

struct AttentionImage {
  int64_t queries, keys, heads, head_dim;
  AttentionPatches patches;  // of the key grid
  Dtype dtype;               // of q, k, v, out and their gradients
  AttentionRows<const void> q, k, v;
  AttentionMask mask;
  float scale;
  float dropout;          // probability
  uint64_t seed;          // of dropout
  uint64_t first_weight;  // index of the image's first weight among all (b, head, n, s)
};

struct AttentionForward {
  AttentionRows<void> out;
  // [heads][queries]; +inf for queries without any key. The rounding error of a float would scale all weights of a row
  // in backward, by more than all other rounding.
  double* logsumexp;
};

struct AttentionBackward {
  AttentionRows<const void> out, grad_out;
  const double* logsumexp;     // [heads][queries]
  AttentionRows<void> grad_q;  // in the image's type
  AttentionRows<float> grad_k, grad_v;
  bool adds;  // whether grad_k and grad_v hold the sums of other queries already
};

// Memory for a block of queries and some heads of them; a head's `channels` are padded with zeros to full vectors.
struct AttentionWorkspace {
  int64_t queries, channels, heads;
  uint32_t* inside;      // [patches] bits of the keys that the grid has
  uint32_t* present;     // [patches] bits of those that are not padding
  uint32_t* attended;    // [patches][queries] bits of the keys that a query attends to
  int32_t* keys;         // [queries] how many keys a query attends to
  int32_t* steps;        // [kAttentionKeys] from a patch's first key to each
  float* source[2];      // [w] two neighboring rows of mask logits
  float* mixed;          // [w] the row interpolated between them, and room for reading beyond it
  int32_t* active;       // [queries] the queries that attend to the patch
  int32_t* offsets;      // [queries] where their rows of `channels` begin
  int32_t* key_offsets;  // [kAttentionKeys]
  float* rows;           // [kAttentionKeys][channels] keys of a patch
  float* columns;        // [channels][kAttentionKeys] the same
  float* values;         // [kAttentionKeys][channels]
  float* weights;        // [queries][kAttentionKeys] of a patch (of a group of queries in forward)
  // Of each of `heads` heads:
  float* q;        // [queries][channels], scaled
  float* out;      // [queries][channels] of a run of patches, directly followed by
  float* total;    // [queries][kLanes] the sums of its weights
  float* sums;     // out and total of the previous runs
  float* maximum;  // [queries] the running maximum of the scores
  // Of each of them, for backward only:
  float* grad_out;  // [queries][channels]
  float* delta;     // [queries] sum_c grad_out out
  // For backward only:
  float* slopes;                   // [queries][kAttentionKeys] gradient of the scores
  float* value_columns;            // [channels][kAttentionKeys]
  float *grad_rows, *grad_values;  // [kAttentionKeys][channels]

  void lay_out(Carver& carver, const AttentionImage& image, bool backward) {
    queries = image.queries < kAttentionQueries ? image.queries : kAttentionQueries;
    channels = to_full_vectors(image.head_dim);
    const int64_t bytes = queries * (3 * channels + 2 * kMostLanes + (backward ? channels : 0)) * sizeof(float);
    heads = bytes * image.heads <= kAttentionCache ? image.heads : kAttentionCache / bytes;
    if (heads < 1) heads = 1;
    const int64_t patches = image.patches.count, w = to_full_vectors(image.mask.first.w);
    carver.take(inside, patches);
    carver.take(present, patches);
    carver.take(attended, patches * queries);
    carver.take(keys, queries);
    carver.take(steps, kAttentionKeys);
    carver.take(source[0], w);
    carver.take(source[1], w);
    carver.take(mixed, w + 8 * kMostLanes);
    carver.take(active, queries);
    carver.take(offsets, queries);
    carver.take(key_offsets, kAttentionKeys);
    for (float** block : {&rows, &columns, &values}) carver.take(*block, kAttentionKeys * channels);
    carver.take(weights, queries * kAttentionKeys);
    carver.take(q, heads * queries * channels);
    carver.take(out, heads * queries * (channels + kMostLanes));
    total = out == nullptr ? nullptr : out + queries * channels;
    carver.take(sums, heads * queries * (channels + kMostLanes));
    carver.take(maximum, heads * queries);
    carver.take(grad_out, backward ? heads * queries * channels : 0);
    carver.take(delta, backward ? heads * queries : 0);
    if (!backward) return;
    carver.take(slopes, queries * kAttentionKeys);
    for (float** block : {&value_columns, &grad_rows, &grad_values}) carver.take(*block, kAttentionKeys * channels);
  }
};

// The part that a call computes: queries [first_query, first_query + num_queries), at most kAttentionQueries, and heads
// [first_head, last_head).
struct AttentionTask {
  int64_t first_query, num_queries, first_head, last_head;
};

FASTMASK_KERNEL(void masked_attention_forward(const AttentionImage& image, const AttentionForward& result,
                                              const AttentionTask& task, const AttentionWorkspace& work))

FASTMASK_KERNEL(void masked_attention_backward(const AttentionImage& image, const AttentionBackward& result,
                                               const AttentionTask& task, const AttentionWorkspace& work))

}  // namespace fastmask
