#include "cpu/masked_attention.h"

#include "cpu/masked_attention_tiles.h"
#include "cpu/simd/functions.h"
#include "cpu/simd/load_logits.h"
#include "cpu/simd/philox.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr float kLowest = -3.402823466e38f;

// Blocks of keys are summed in runs of this many, then the runs: rounding grows with the longest chain of additions.
constexpr int64_t kRun = 16;

inline int64_t key_blocks(const AttentionImage& image) { return ceil_div(image.keys, kKeys); }

using Workspace = AttentionWorkspace;

void find_present(const AttentionImage& image, uint32_t* present) {
  for (int64_t block = 0; block < key_blocks(image); ++block) {
    const int64_t first = block * kKeys;
    const int64_t count = image.keys - first < kKeys ? image.keys - first : kKeys;
    uint32_t word = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool padding = image.mask.padding != nullptr && image.mask.padding[first + i] != 0;
      word |= static_cast<uint32_t>(!padding) << i;
    }
    present[block] = word;
  }
}

// Resamples a query's mask logits to the centers of the key grid's cells. Logits of the grid's size are copied.
void resample(const AttentionMask& mask, int64_t query, const Workspace& work) {
  const Taps &rows = mask.resampling.rows, &columns = mask.resampling.columns;
  const int64_t w = mask.first.w;
  if (rows.out == mask.first.h && columns.out == w && mask.first.row_stride == w) {
    load_logits(after(mask.first.logits, query * mask.stride), rows.out * w, work.samples);
    return;
  }
  for (int64_t y = 0; y < rows.out; ++y) {
    for (int t = 0; t < 2; ++t) {
      const Logits row = after(row_of(mask.first, rows.index[t * rows.stride + y]), query * mask.stride);
      load_logits(row, w, work.source[t]);
    }
    const float upper_weight = rows.weight[y], lower_weight = rows.weight[rows.stride + y];
    for (int64_t x = 0; x < w; x += kLanes) {
      const vfloat upper = load(work.source[0] + x), lower = load(work.source[1] + x);
      store(work.mixed + x, upper * upper_weight + lower * lower_weight);
    }
    float* out = work.samples + y * columns.out;
    const int32_t *first = columns.index, *second = first + columns.stride;
    for (int64_t x = 0; x < columns.out; ++x) {
      out[x] = work.mixed[first[x]] * columns.weight[x] + work.mixed[second[x]] * columns.weight[columns.stride + x];
    }
  }
}

// Finds the keys that each query attends to: keys in its foreground that are not padding, or all others than padding if
// there are none.
void find_attended(const AttentionImage& image, int64_t first_query, int64_t num_queries, const Workspace& work) {
  const int64_t blocks = key_blocks(image);
  find_present(image, work.present);
  int64_t present_keys = 0;
  for (int64_t s = 0; s < kKeys; ++s) work.key_offsets[s] = static_cast<int32_t>(s * work.channels);
  for (int64_t block = 0; block < blocks; ++block) present_keys += __builtin_popcount(work.present[block]);
  for (int64_t s = image.keys; s < blocks * kKeys; ++s) work.samples[s] = 0.0f;
  for (int64_t n = 0; n < num_queries; ++n) {
    uint32_t* attended = work.attended + n;
    int64_t keys = 0;
    if (image.mask.first.logits.data != nullptr) {
      resample(image.mask, first_query + n, work);
      for (int64_t block = 0; block < blocks; ++block) {
        uint32_t foreground = 0;
        for (int part = 0; part < kParts; ++part) {
          const vint lanes = load(work.samples + block * kKeys + part * kLanes) >= 0.0f;
          foreground |= lane_bits(lanes) << (part * kLanes);
        }
        attended[block * num_queries] = foreground & work.present[block];
        keys += __builtin_popcount(attended[block * num_queries]);
      }
    }
    work.keys[n] = static_cast<int32_t>(keys > 0 ? keys : present_keys);
    if (keys > 0) continue;
    for (int64_t block = 0; block < blocks; ++block) attended[block * num_queries] = work.present[block];
  }
}

// Lists the queries that attend to a block of keys; returns how many.
int64_t find_active(const uint32_t* attended, int64_t num_queries, const Workspace& work) {
  int64_t count = 0;
  for (int64_t n = 0; n < num_queries; ++n) {
    work.active[count] = static_cast<int32_t>(n);
    work.offsets[count] = static_cast<int32_t>(n * work.channels);
    count += attended[n] != 0;
  }
  return count;
}

// Loads row `index` of a head as float, padded with zeros to full vectors.
template <typename T>
inline void load_row(const AttentionImage& image, const AttentionRows<T>& rows, int64_t head, int64_t index,
                     float* out) {
  const int64_t offset = rows.offset + index * rows.stride + head * image.head_dim;
  load_logits({rows.data, image.dtype, offset}, image.head_dim, out);
}

inline void store_row(const AttentionImage& image, const AttentionRows<void>& rows, int64_t head, int64_t index,
                      const float* in) {
  store_logits(in, image.head_dim, rows.data, image.dtype, rows.offset + index * rows.stride + head * image.head_dim);
}

// Loads the rows of a block of keys; zeros for padding, which may hold NaN, and beyond the last key.
void load_keys(const AttentionImage& image, const AttentionRows<const void>& rows, int64_t head, int64_t block,
               const Workspace& work, float* out) {
  for (int64_t i = 0; i < kKeys; ++i) {
    float* row = out + i * work.channels;
    if ((work.present[block] >> i & 1) != 0) {
      load_row(image, rows, head, block * kKeys + i, row);
    } else {
      memset(row, 0, sizeof(float) * work.channels);
    }
  }
}

void load_scaled_queries(const AttentionImage& image, int64_t head, int64_t first, int64_t count,
                         const Workspace& work) {
  for (int64_t n = 0; n < count; ++n) {
    float* row = work.q + n * work.channels;
    load_row(image, image.q, head, first + n, row);
    for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * image.scale);
  }
}

// The lanes that dropout keeps among the weights of a query and head, from key `key` on.
inline vint kept(const AttentionImage& image, int64_t head, int64_t query, int64_t key) {
  const uint64_t row = static_cast<uint64_t>(head * image.queries + query);
  const uint64_t index = image.first_weight + row * static_cast<uint64_t>(image.keys) + static_cast<uint64_t>(key);
  return keep_lanes(image.seed, index, image.dropout);
}

// Adds a run of blocks, the first `floats` numbers of out and total, to the previous runs, and begins the next one.
inline void end_run(const Workspace& work, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) {
    store(work.sums + i, load(work.sums + i) + load(work.out + i));
    store(work.out + i, vfloat{});
  }
}

// Turns a query's scores of one block into weights exp(score - maximum), relative to the running maximum; if a score
// exceeds the maximum, the previous sums are scaled down.
inline void soften(float* scores, uint32_t attended, int64_t n, const Workspace& work) {
  vfloat peak = splat(kLowest);
  for (int part = 0; part < kParts; ++part) {
    const vfloat score = load(scores + part * kLanes);
    peak = (select(attended, part) & (score > peak)) ? score : peak;
  }
  if (lane_bits(peak > work.maximum[n]) != 0) {
    const float largest = largest_lane(peak);
    const vfloat factor = exp_neg(splat(largest - work.maximum[n]));
    work.maximum[n] = largest;
    for (int part = 0; part < 2; ++part) {
      const int64_t start = part == 0 ? 0 : work.sums - work.out;
      float *total = work.total + start + n * kLanes, *row = work.out + start + n * work.channels;
      store(total, load(total) * factor);
      for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * factor);
    }
  }
  vfloat total = load(work.total + n * kLanes);
  for (int part = 0; part < kParts; ++part) {
    float* at = scores + part * kLanes;
    const vfloat weight = masked(select(attended, part), exp_neg(work.maximum[n] - load(at)));
    total += weight;
    store(at, weight);
  }
  store(work.total + n * kLanes, total);
}

void drop(const AttentionImage& image, int64_t head, int64_t query, int64_t key, float* weights) {
  for (int part = 0; part < kParts; ++part) {
    float* at = weights + part * kLanes;
    store(at, masked(kept(image, head, query, key + part * kLanes), load(at)));
  }
}

// The factor by which dropout multiplies the weights that it keeps.
inline float kept_scale(const AttentionImage& image) {
  return image.dropout < 1.0f ? 1.0f / (1.0f - image.dropout) : 0.0f;
}

void forward_head(const AttentionImage& image, const AttentionForward& result, const AttentionTask& task, int64_t head,
                  const Workspace& work) {
  const int64_t first_query = task.first_query, num_queries = task.num_queries;
  load_scaled_queries(image, head, first_query, num_queries, work);
  const int64_t floats = work.total - work.out + num_queries * kLanes;
  memset(work.out, 0, sizeof(float) * floats);
  memset(work.sums, 0, sizeof(float) * floats);
  for (int64_t n = 0; n < num_queries; ++n) work.maximum[n] = kLowest;
  for (int64_t block = 0; block < key_blocks(image); ++block) {
    if (block > 0 && block % kRun == 0) end_run(work, floats);
    const uint32_t* attended = work.attended + block * num_queries;
    const int64_t count = find_active(attended, num_queries, work);
    if (count == 0) continue;
    load_keys(image, image.k, head, block, work, work.rows);
    transpose_rows(work.rows, work.channels, work.columns);
    load_keys(image, image.v, head, block, work, work.values);
    for_groups(count, [&]<int G>(int64_t first) {
      tile_products<G>(work.q, work.offsets + first, work.columns, image.head_dim, work.weights);
      for (int g = 0; g < G; ++g) {
        const int64_t n = work.active[first + g];
        soften(work.weights + g * kKeys, attended[n], n, work);
        if (image.dropout > 0.0f) drop(image, head, first_query + n, block * kKeys, work.weights + g * kKeys);
      }
      tile_combine<G>(work.weights, kKeys, 1, work.values, work.key_offsets, kKeys, work.out, work.offsets + first,
                      work.channels);
    });
  }
  end_run(work, floats);
  for (int64_t n = 0; n < num_queries; ++n) {
    const double total = sum_lanes(load(work.sums + (work.total - work.out) + n * kLanes));
    const bool empty = total == 0.0;
    const vfloat factor = splat(empty ? 0.0f : static_cast<float>(kept_scale(image) / total));
    float* row = work.sums + n * work.channels;
    for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * factor);
    store_row(image, result.out, head, first_query + n, row);
    result.logsumexp[head * image.queries + first_query + n] =
        empty ? __builtin_inf() : work.maximum[n] + __builtin_log(total);
  }
}

// Turns a query's scores of one block into the weights that multiply the values, and the products of grad_out with the
// values into the gradients of the scores: weight (kept product / (1 - dropout) - delta). delta is the weighted mean of
// the kept products. If the query attends to no other block, delta is computed from this block: with few keys, weights
// are near 1 and products near delta, so that the rounding of delta would dominate the difference.
inline void differentiate(const AttentionImage& image, double logsumexp, uint32_t attended, bool whole, int64_t head,
                          int64_t query, int64_t key, float delta, float* weights, float* slopes) {
  const float scale = kept_scale(image);
  const float rounded = static_cast<float>(logsumexp), rest = static_cast<float>(logsumexp - rounded);
  vfloat passed[kParts], weight[kParts], slope[kParts], total = {}, mean = {};
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = part * kLanes;
    const vint lanes = select(attended, part);
    weight[part] = masked(lanes, exp_neg((rounded - load(weights + at)) + rest));
    passed[part] = splat(scale);
    if (image.dropout > 0.0f) passed[part] = masked(kept(image, head, query, key + at), passed[part]);
    slope[part] = masked(lanes, load(slopes + at) * passed[part]);
    total = total + weight[part];
    mean = fma(weight[part], slope[part], mean);
  }
  const vfloat center = splat(whole ? static_cast<float>(sum_lanes(mean) / sum_lanes(total)) : delta);
  for (int part = 0; part < kParts; ++part) {
    store(slopes + part * kLanes, masked(select(attended, part), weight[part] * (slope[part] - center)));
    store(weights + part * kLanes, weight[part] * passed[part]);
  }
}

// Adds the gradients of a block of keys to those of the image.
void add_rows(const AttentionImage& image, const AttentionRows<float>& rows, int64_t head, int64_t block,
              const Workspace& work, const float* gradients) {
  const int64_t first = block * kKeys;
  const int64_t count = image.keys - first < kKeys ? image.keys - first : kKeys;
  for (int64_t i = 0; i < count; ++i) {
    float* at = rows.data + rows.offset + (first + i) * rows.stride + head * image.head_dim;
    const float* gradient = gradients + i * work.channels;
    for (int64_t c = 0; c < image.head_dim; ++c) at[c] += gradient[c];
  }
}

void backward_head(const AttentionImage& image, const AttentionBackward& result, const AttentionTask& task,
                   int64_t head, const Workspace& work) {
  const int64_t first_query = task.first_query, num_queries = task.num_queries;
  load_scaled_queries(image, head, first_query, num_queries, work);
  for (int64_t n = 0; n < num_queries; ++n) {
    float *grad_row = work.grad_out + n * work.channels, *out_row = work.out + n * work.channels;
    load_row(image, result.grad_out, head, first_query + n, grad_row);
    load_row(image, result.out, head, first_query + n, out_row);
    work.delta[n] = product(grad_row, out_row, image.head_dim);
  }
  float* grad_q = work.out;  // the output is no longer needed
  const int64_t floats = num_queries * work.channels;
  memset(grad_q, 0, sizeof(float) * floats);
  memset(work.sums, 0, sizeof(float) * floats);
  const double* logsumexp = result.logsumexp + head * image.queries + first_query;
  for (int64_t block = 0; block < key_blocks(image); ++block) {
    const uint32_t* attended = work.attended + block * num_queries;
    if (block > 0 && block % kRun == 0) end_run(work, floats);
    const int64_t count = find_active(attended, num_queries, work);
    if (count == 0) continue;
    load_keys(image, image.v, head, block, work, work.values);
    transpose_rows(work.values, work.channels, work.value_columns);
    load_keys(image, image.k, head, block, work, work.rows);
    transpose_rows(work.rows, work.channels, work.columns);
    for_groups(count, [&]<int G>(int64_t first) {
      float *weights = work.weights + first * kKeys, *slopes = work.slopes + first * kKeys;
      tile_products<G>(work.q, work.offsets + first, work.columns, image.head_dim, weights);
      tile_products<G>(work.grad_out, work.offsets + first, work.value_columns, image.head_dim, slopes);
      for (int g = 0; g < G; ++g) {
        const int64_t n = work.active[first + g];
        const bool whole = work.keys[n] == __builtin_popcount(attended[n]);
        differentiate(image, logsumexp[n], attended[n], whole, head, first_query + n, block * kKeys, work.delta[n],
                      weights + g * kKeys, slopes + g * kKeys);
        // The weight of a single key is 1 whatever its score, so its gradient is 0 up to rounding.
        if (work.keys[n] == 1) memset(slopes + g * kKeys, 0, sizeof(float) * kKeys);
      }
      tile_combine<G>(slopes, kKeys, 1, work.rows, work.key_offsets, kKeys, grad_q, work.offsets + first,
                      work.channels);
    });
    memset(work.grad_rows, 0, sizeof(float) * kKeys * work.channels);
    memset(work.grad_values, 0, sizeof(float) * kKeys * work.channels);
    for (int64_t s = 0; s < kKeys; s += kGroup) {
      tile_combine<kGroup>(work.slopes + s, 1, kKeys, work.q, work.offsets, count, work.grad_rows, work.key_offsets + s,
                           work.channels);
      tile_combine<kGroup>(work.weights + s, 1, kKeys, work.grad_out, work.offsets, count, work.grad_values,
                           work.key_offsets + s, work.channels);
    }
    add_rows(image, result.grad_k, head, block, work, work.grad_rows);
    add_rows(image, result.grad_v, head, block, work, work.grad_values);
  }
  end_run(work, floats);
  for (int64_t n = 0; n < num_queries; ++n) {
    float* row = work.sums + n * work.channels;
    for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * image.scale);
    store_row(image, result.grad_q, head, first_query + n, row);
  }
}

}  // namespace

void masked_attention_forward(const AttentionImage& image, const AttentionForward& result, const AttentionTask& task,
                              const AttentionWorkspace& work) {
  find_attended(image, task.first_query, task.num_queries, work);
  for (int64_t head = task.first_head; head < task.last_head; ++head) forward_head(image, result, task, head, work);
}

void masked_attention_backward(const AttentionImage& image, const AttentionBackward& result, const AttentionTask& task,
                               const AttentionWorkspace& work) {
  find_attended(image, task.first_query, task.num_queries, work);
  for (int64_t head = task.first_head; head < task.last_head; ++head) backward_head(image, result, task, head, work);
}

}  // namespace fastmask::FASTMASK_SIMD
