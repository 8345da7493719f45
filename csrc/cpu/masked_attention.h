// softmax(M + scale q k^T) v of one image (Mask2Former, arXiv:2112.01527, equation 2), and its gradient.
//
// Whether a query attends to a key is one bit, computed from the mask logits for one block of queries at a time and
// used by all heads. Keys are processed in blocks of kAttentionKeys; a query skips blocks in which it attends to no
// key.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/simd.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kAttentionKeys = 32;
constexpr int64_t kAttentionQueries = 128;  // at most in a block, so that a head's arrays for them fit the cache

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

struct AttentionImage {
  int64_t queries, keys, heads, head_dim;
  Dtype dtype;  // of q, k, v, out and their gradients
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
  const double* logsumexp;              // [heads][queries]
  AttentionRows<void> grad_q;           // in the image's type
  AttentionRows<float> grad_k, grad_v;  // added to
};

// Memory for a block of queries; a head's `channels` are padded with zeros to full vectors.
struct AttentionWorkspace {
  int64_t channels;
  uint32_t* present;     // [key blocks] bits of the keys that are not padding
  uint32_t* attended;    // [key blocks][queries] bits of the keys that a query attends to
  int32_t* keys;         // [queries] how many keys a query attends to
  float* samples;        // [keys] a query's mask on the key grid
  float* source[2];      // [w] two neighboring rows of mask logits
  float* mixed;          // [w] the row interpolated between them
  int32_t* active;       // [queries] the queries that attend to the block of keys
  int32_t* offsets;      // [queries] where their rows of `channels` begin
  int32_t* key_offsets;  // [kAttentionKeys]
  float* q;              // [queries][channels], scaled
  float* out;            // [queries][channels] of a run of blocks, directly followed by
  float* total;          // [queries][kLanes] the sums of its weights
  float* sums;           // out and total of the previous runs
  float* maximum;        // [queries] the running maximum of the scores
  float* rows;           // [kAttentionKeys][channels] a block of keys
  float* columns;        // [channels][kAttentionKeys] the same
  float* values;         // [kAttentionKeys][channels]
  float* weights;        // [queries][kAttentionKeys] of a block of keys (of a group of queries in forward)
  // For backward only:
  float* grad_out;                 // [queries][channels]
  float* delta;                    // [queries] sum_c grad_out out
  float* slopes;                   // [queries][kAttentionKeys] gradient of the scores
  float* value_columns;            // [channels][kAttentionKeys]
  float *grad_rows, *grad_values;  // [kAttentionKeys][channels]

  void lay_out(Carver& carver, const AttentionImage& image, bool backward) {
    const int64_t queries = image.queries < kAttentionQueries ? image.queries : kAttentionQueries;
    const int64_t blocks = ceil_div(image.keys, kAttentionKeys);
    channels = to_full_vectors(image.head_dim);
    carver.take(present, blocks);
    carver.take(attended, blocks * queries);
    carver.take(keys, queries);
    carver.take(samples, blocks * kAttentionKeys);
    for (float** row : {&source[0], &source[1], &mixed}) carver.take(*row, to_full_vectors(image.mask.first.w));
    carver.take(active, queries);
    carver.take(offsets, queries);
    carver.take(key_offsets, kAttentionKeys);
    carver.take(q, queries * channels);
    carver.take(out, queries * (channels + kMostLanes));
    total = out == nullptr ? nullptr : out + queries * channels;
    carver.take(sums, queries * (channels + kMostLanes));
    carver.take(maximum, queries);
    for (float** block : {&rows, &columns, &values}) carver.take(*block, kAttentionKeys * channels);
    carver.take(weights, queries * kAttentionKeys);
    if (!backward) return;
    carver.take(grad_out, queries * channels);
    carver.take(delta, queries);
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
