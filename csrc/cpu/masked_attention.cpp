#include "cpu/masked_attention.h"

#include "cpu/attended_keys.h"
#include "cpu/simd/functions.h"
#include "cpu/simd/philox.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr float kLowest = -3.402823466e38f;

// Patches of keys are summed in runs of this many, then the runs: rounding grows with the longest chain of additions.
constexpr int64_t kRun = 16;

using Workspace = AttentionWorkspace;

// Heads that are computed together, so that a patch's rows of keys are read in whole lines.
struct HeadGroup {
  int64_t first, last;
};

// Lists the queries that attend to a patch; returns how many.
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
  if (image.dtype == Dtype::kFloat32 && image.head_dim % kMostLanes == 0) {  // so short that a call would take longer
    const float* const row = static_cast<const float*>(rows.data) + offset;
    for (int64_t c = 0; c < image.head_dim; c += kLanes) store(out + c, load(row + c));
    return;
  }
  load_logits({rows.data, image.dtype, offset}, image.head_dim, out);
}

inline void store_row(const AttentionImage& image, const AttentionRows<void>& rows, int64_t head, int64_t index,
                      const float* in) {
  store_logits(in, image.head_dim, rows.data, image.dtype, rows.offset + index * rows.stride + head * image.head_dim);
}

// Loads the rows of a patch's keys; zeros for padding, which may hold NaN, and beyond the grid. Those of the next patch
// are on their way to the caches meanwhile, an equal share of its rows for each head of the group.
void load_keys(const AttentionImage& image, const AttentionRows<const void>& rows, const HeadGroup& group, int64_t head,
               int64_t patch, const Workspace& work, float* out) {
  const int64_t size = image.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  const int64_t first = first_key_of(image.patches, patch), next = first_key_of(image.patches, patch + 1);
  const uint32_t present = work.present[patch];
  const uint32_t present_next = patch + 1 < image.patches.count ? work.present[patch + 1] : 0;
  const char* const next_rows =
      static_cast<const char*>(rows.data) + (rows.offset + next * rows.stride + group.first * image.head_dim) * size;
  const int64_t row_size = (group.last - group.first) * image.head_dim * size;
  for (int64_t i = 0; i < kKeys; ++i) {
    if (i % (group.last - group.first) == head - group.first && (present_next >> i & 1) != 0) {
      const char* const next_row = next_rows + work.steps[i] * rows.stride * size;
      for (int64_t byte = 0; byte < row_size; byte += 64) __builtin_prefetch(next_row + byte, 0, 2);
    }
    float* row = out + i * work.channels;
    if ((present >> i & 1) != 0) {
      load_row(image, rows, head, first + work.steps[i], row);
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

// The lanes that dropout keeps among the weights of a query and head, for the keys at `steps` from `key`.
inline vint kept(const AttentionImage& image, int64_t head, int64_t query, int64_t key, const int32_t* steps) {
  const uint64_t row = static_cast<uint64_t>(head * image.queries + query);
  const uint64_t index = image.first_weight + row * static_cast<uint64_t>(image.keys) + static_cast<uint64_t>(key);
  return keep_lanes(image.seed, index, load(steps), image.dropout);
}

// Adds a run of patches, the first `floats` numbers of out and total, to the previous runs, and begins the next one.
inline void end_run(const Workspace& work, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) {
    store(work.sums + i, load(work.sums + i) + load(work.out + i));
    store(work.out + i, vfloat{});
  }
}

// Turns a query's scores of one patch into weights exp(score - maximum), relative to the running maximum; if a score
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

void drop(const AttentionImage& image, int64_t head, int64_t query, int64_t key, const int32_t* steps, float* weights) {
  for (int part = 0; part < kParts; ++part) {
    float* at = weights + part * kLanes;
    store(at, masked(kept(image, head, query, key, steps + part * kLanes), load(at)));
  }
}

// The factor by which dropout multiplies the weights that it keeps.
inline float kept_scale(const AttentionImage& image) {
  return image.dropout < 1.0f ? 1.0f / (1.0f - image.dropout) : 0.0f;
}

struct Forward {
  const AttentionImage& image;
  const AttentionForward& result;
  const AttentionTask& task;

  // How many numbers of work.out a run of patches adds up.
  int64_t floats(const Workspace& work) const { return work.total - work.out + task.num_queries * kLanes; }

  void begin(int64_t head, const Workspace& work) const {
    load_scaled_queries(image, head, task.first_query, task.num_queries, work);
    memset(work.out, 0, sizeof(float) * floats(work));
    memset(work.sums, 0, sizeof(float) * floats(work));
    for (int64_t n = 0; n < task.num_queries; ++n) work.maximum[n] = kLowest;
  }

  void visit(const HeadGroup& group, int64_t head, int64_t patch, int64_t count, const Workspace& work) const {
    const uint32_t* attended = work.attended + patch * task.num_queries;
    const int64_t first_key = first_key_of(image.patches, patch);
    load_keys(image, image.k, group, head, patch, work, work.rows);
    transpose_rows(work.rows, work.channels, work.columns);
    load_keys(image, image.v, group, head, patch, work, work.values);
    for_groups(count, [&]<int G>(int64_t first) {
      tile_products<G>(work.q, work.offsets + first, work.columns, image.head_dim, work.weights);
      for (int g = 0; g < G; ++g) {
        const int64_t n = work.active[first + g];
        float* const weights = work.weights + g * kKeys;
        soften(weights, attended[n], n, work);
        if (image.dropout > 0.0f) drop(image, head, task.first_query + n, first_key, work.steps, weights);
      }
      tile_combine<G>(work.weights, kKeys, 1, work.values, work.key_offsets, kKeys, work.out, work.offsets + first,
                      work.channels);
    });
  }

  void skip(int64_t, int64_t, const Workspace&) const {}

  void end(int64_t head, const Workspace& work) const {
    const float* const totals = work.sums + (work.total - work.out);
    for (int64_t n = 0; n < task.num_queries; ++n) {
      const double total = sum_lanes(load(totals + n * kLanes));
      const bool empty = total == 0.0;
      const vfloat factor = splat(empty ? 0.0f : static_cast<float>(kept_scale(image) / total));
      float* row = work.sums + n * work.channels;
      for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * factor);
      store_row(image, result.out, head, task.first_query + n, row);
      result.logsumexp[head * image.queries + task.first_query + n] =
          empty ? __builtin_inf() : work.maximum[n] + __builtin_log(total);
    }
  }
};

// Turns a query's scores of one patch into the weights that multiply the values, and the products of grad_out with the
// values into the gradients of the scores: weight (kept product / (1 - dropout) - delta). delta is the weighted mean of
// the kept products. If the query attends to no other patch, delta is computed from this patch: with few keys, weights
// are near 1 and products near delta, so that the rounding of delta would dominate the difference.
inline void differentiate(const AttentionImage& image, double logsumexp, uint32_t attended, bool whole, int64_t head,
                          int64_t query, int64_t key, const int32_t* steps, float delta, float* weights,
                          float* slopes) {
  const float scale = kept_scale(image);
  const float rounded = static_cast<float>(logsumexp), rest = static_cast<float>(logsumexp - rounded);
  vfloat passed[kParts], weight[kParts], slope[kParts], total = {}, mean = {};
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = part * kLanes;
    const vint lanes = select(attended, part);
    weight[part] = masked(lanes, exp_neg((rounded - load(weights + at)) + rest));
    passed[part] = splat(scale);
    if (image.dropout > 0.0f) passed[part] = masked(kept(image, head, query, key, steps + at), passed[part]);
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

// Stores the gradients of a patch's keys, or adds them to those of other queries. Those of padding are 0.
void store_rows(const AttentionImage& image, const AttentionRows<float>& rows, bool adds, int64_t head, int64_t patch,
                const Workspace& work, const float* gradients) {
  const int64_t first = first_key_of(image.patches, patch);
  for (int64_t i = 0; i < kKeys; ++i) {
    if ((work.inside[patch] >> i & 1) == 0) continue;
    const bool present = (work.present[patch] >> i & 1) != 0;
    float* at = rows.data + rows.offset + (first + work.steps[i]) * rows.stride + head * image.head_dim;
    const float* gradient = gradients + i * work.channels;
    if (adds && present) {
      for (int64_t c = 0; c < image.head_dim; ++c) at[c] += gradient[c];
    } else if (!adds) {
      for (int64_t c = 0; c < image.head_dim; ++c) at[c] = present ? gradient[c] : 0.0f;
    }
  }
}

struct Backward {
  const AttentionImage& image;
  const AttentionBackward& result;
  const AttentionTask& task;

  // work.out holds the gradient of the queries, once delta is known.
  int64_t floats(const Workspace& work) const { return task.num_queries * work.channels; }

  void begin(int64_t head, const Workspace& work) const {
    load_scaled_queries(image, head, task.first_query, task.num_queries, work);
    for (int64_t n = 0; n < task.num_queries; ++n) {
      float *grad_row = work.grad_out + n * work.channels, *out_row = work.out + n * work.channels;
      load_row(image, result.grad_out, head, task.first_query + n, grad_row);
      load_row(image, result.out, head, task.first_query + n, out_row);
      work.delta[n] = product(grad_row, out_row, image.head_dim);
    }
    memset(work.out, 0, sizeof(float) * floats(work));
    memset(work.sums, 0, sizeof(float) * floats(work));
  }

  void visit(const HeadGroup& group, int64_t head, int64_t patch, int64_t count, const Workspace& work) const {
    const uint32_t* attended = work.attended + patch * task.num_queries;
    const double* logsumexp = result.logsumexp + head * image.queries + task.first_query;
    const int64_t first_key = first_key_of(image.patches, patch);
    load_keys(image, image.v, group, head, patch, work, work.values);
    transpose_rows(work.values, work.channels, work.value_columns);
    load_keys(image, image.k, group, head, patch, work, work.rows);
    transpose_rows(work.rows, work.channels, work.columns);
    for_groups(count, [&]<int G>(int64_t first) {
      float *weights = work.weights + first * kKeys, *slopes = work.slopes + first * kKeys;
      tile_products<G>(work.q, work.offsets + first, work.columns, image.head_dim, weights);
      tile_products<G>(work.grad_out, work.offsets + first, work.value_columns, image.head_dim, slopes);
      for (int g = 0; g < G; ++g) {
        const int64_t n = work.active[first + g];
        const bool whole = work.keys[n] == __builtin_popcount(attended[n]);
        differentiate(image, logsumexp[n], attended[n], whole, head, task.first_query + n, first_key, work.steps,
                      work.delta[n], weights + g * kKeys, slopes + g * kKeys);
        // The weight of a single key is 1 whatever its score, so its gradient is 0 up to rounding.
        if (work.keys[n] == 1) memset(slopes + g * kKeys, 0, sizeof(float) * kKeys);
      }
      tile_combine<G>(slopes, kKeys, 1, work.rows, work.key_offsets, kKeys, work.out, work.offsets + first,
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
    store_rows(image, result.grad_k, result.adds, head, patch, work, work.grad_rows);
    store_rows(image, result.grad_v, result.adds, head, patch, work, work.grad_values);
  }

  // A patch that no query attends to.
  void skip(int64_t head, int64_t patch, const Workspace& work) const {
    if (result.adds) return;
    memset(work.grad_rows, 0, sizeof(float) * kKeys * work.channels);
    store_rows(image, result.grad_k, false, head, patch, work, work.grad_rows);
    store_rows(image, result.grad_v, false, head, patch, work, work.grad_rows);
  }

  void end(int64_t head, const Workspace& work) const {
    for (int64_t n = 0; n < task.num_queries; ++n) {
      float* row = work.sums + n * work.channels;
      for (int64_t c = 0; c < work.channels; c += kLanes) store(row + c, load(row + c) * image.scale);
      store_row(image, result.grad_q, head, task.first_query + n, row);
    }
  }
};

// The arrays of one of the heads that have theirs in `work`.
Workspace of_head(Workspace work, int64_t head) {
  const int64_t rows = head * work.queries * work.channels, totals = head * work.queries * kMostLanes;
  work.q += rows;
  work.out += rows + totals;
  work.total += rows + totals;
  work.sums += rows + totals;
  work.maximum += head * work.queries;
  work.grad_out += rows;
  work.delta += head * work.queries;
  return work;
}

// Computes the heads of a task, as many at a time as have their arrays in the cache together.
template <typename Pass>
void run(const Pass& pass, const Workspace& work) {
  const auto& [image, result, task] = pass;
  find_attended(image, task.first_query, task.num_queries, work);
  for (int64_t i = 0; i < kKeys; ++i) work.key_offsets[i] = static_cast<int32_t>(i * work.channels);
  HeadGroup group{};
  for (group.first = task.first_head; group.first < task.last_head; group.first = group.last) {
    group.last = group.first + work.heads < task.last_head ? group.first + work.heads : task.last_head;
    const auto for_each_head = [&](const auto& f) {
      for (int64_t head = group.first; head < group.last; ++head) f(head, of_head(work, head - group.first));
    };
    const auto end_runs = [&] {
      for_each_head([&](int64_t, const Workspace& own) { end_run(own, pass.floats(own)); });
    };
    for_each_head([&](int64_t head, const Workspace& own) { pass.begin(head, own); });
    for (int64_t patch = 0; patch < image.patches.count; ++patch) {
      if (patch > 0 && patch % kRun == 0) end_runs();
      const int64_t count = find_active(work.attended + patch * task.num_queries, task.num_queries, work);
      for_each_head([&](int64_t head, const Workspace& own) {
        count == 0 ? pass.skip(head, patch, own) : pass.visit(group, head, patch, count, own);
      });
    }
    end_runs();
    for_each_head([&](int64_t head, const Workspace& own) { pass.end(head, own); });
  }
}

}  // namespace

void masked_attention_forward(const AttentionImage& image, const AttentionForward& result, const AttentionTask& task,
                              const AttentionWorkspace& work) {
  run(Forward{image, result, task}, work);
}

void masked_attention_backward(const AttentionImage& image, const AttentionBackward& result, const AttentionTask& task,
                               const AttentionWorkspace& work) {
  run(Backward{image, result, task}, work);
}

}  // namespace fastmask::FASTMASK_SIMD
