// softmax(M + scale q k^T) v of one image (Mask2Former, arXiv:2112.01527, equation 2), and its gradient.
//
// Whether a query attends to a key is one bit, made from the mask logits for a block of queries at a time and used by
// all heads. Keys are taken kAttentionKeys at a time; a query skips those blocks in which it attends to nothing.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/interpolation.h"
#include "common/simd.h"

namespace fastmask {

constexpr int64_t kAttentionKeys = 32;
constexpr int64_t kAttentionQueries = 128;  // at most in a block: what a head keeps of them fits the cache

// Rows of one image from element `offset` on, `stride` elements apart; heads lie side by side in a row.
template <typename T>
struct AttentionRows {
  T* data;
  int64_t offset;
  int64_t stride;
};

struct AttentionMask {
  const void* logits;  // [queries][h * w] from element `offset` on, `stride` elements apart; null: no mask
  Dtype dtype;
  int64_t offset;
  int64_t stride;
  Resampling resampling;   // to the key grid
  int64_t height, width;   // of the key grid
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
  // [heads][queries]; +inf for queries without any key. As float, what rounding takes would scale all of a row's
  // weights in backward, which is more than all other rounding.
  double* logsumexp;
};

struct AttentionBackward {
  AttentionRows<const void> out, grad_out;
  const double* logsumexp;              // [heads][queries]
  AttentionRows<void> grad_q;           // in the image's type
  AttentionRows<float> grad_k, grad_v;  // added to
};

// Floats of scratch memory; the kernels want it at a 64-byte boundary.
FASTMASK_KERNEL(int64_t masked_attention_scratch(const AttentionImage& image, bool backward))

// Queries [first_query, first_query + num_queries), at most kAttentionQueries, and heads [first_head, last_head).
FASTMASK_KERNEL(void masked_attention_forward(const AttentionImage& image, const AttentionForward& result,
                                              int64_t first_query, int64_t num_queries, int64_t first_head,
                                              int64_t last_head, float* scratch))

FASTMASK_KERNEL(void masked_attention_backward(const AttentionImage& image, const AttentionBackward& result,
                                               int64_t first_query, int64_t num_queries, int64_t first_head,
                                               int64_t last_head, float* scratch))

}  // namespace fastmask
