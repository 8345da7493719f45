#include "cpu/masked_attention.h"

#include <algorithm>
#include <tuple>

#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

// A tensor (B, rows, E) whose last dimension is contiguous.
Tensor with_contiguous_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have three dimensions, got ", tensor.dim());
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
AttentionRows<T> rows_of(const Tensor& tensor, int64_t image) {
  return {static_cast<T*>(tensor.data_ptr()), image * tensor.stride(0), tensor.stride(1)};
}

// The arguments that forward and backward share, checked.
class Attention {
 public:
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask_logits,
            const std::optional<Tensor>& key_padding_mask, int64_t grid_height, int64_t grid_width, int64_t num_heads,
            double scale, double dropout, const std::optional<Tensor>& seed)
      : q_(with_contiguous_rows(q, "q")),
        k_(with_contiguous_rows(k, "k")),
        v_(with_contiguous_rows(v, "v")),
        height_(grid_height),
        width_(grid_width),
        heads_(num_heads),
        scale_(static_cast<float>(scale)),
        dropout_(static_cast<float>(dropout)),
        dtype_(dtype_of(q, "q")) {
    STD_TORCH_CHECK(grid_height > 0 && grid_width > 0, "the grid must have at least one key");
    STD_TORCH_CHECK(num_heads > 0 && q.size(2) > 0 && q.size(2) % num_heads == 0, "num_heads=", num_heads,
                    " does not divide the ", q.size(2), " channels of q");
    for (const Tensor* tensor : {&k_, &v_}) {
      STD_TORCH_CHECK(tensor->size(0) == batch() && tensor->size(2) == channels() && tensor->size(1) < INT32_MAX &&
                          tensor->size(1) % grid_width == 0 && tensor->size(1) / grid_width == grid_height,
                      "k and v must be (B, S, E) for the B and E of q and the S keys of the grid");
      STD_TORCH_CHECK(tensor->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
    }
    if (mask_logits.has_value()) set_mask(*mask_logits);
    if (key_padding_mask.has_value()) {
      padding_ = torch::stable::contiguous(*key_padding_mask);
      check_tensor(padding_.dim() == 2 && padding_.scalar_type() == ScalarType::Bool && padding_.size(0) == batch() &&
                       padding_.size(1) == keys(),
                   padding_, "key_padding_mask", "(B, S) bool for the B of q and the S of k");
    }
    if (dropout_ > 0) {
      STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "seed must be an int64 tensor of one element");
      seed_ = static_cast<uint64_t>(*data_of<const int64_t>(*seed));
    }
  }

  int64_t batch() const { return q_.size(0); }
  int64_t queries() const { return q_.size(1); }
  int64_t channels() const { return q_.size(2); }
  int64_t keys() const { return height_ * width_; }
  int64_t heads() const { return heads_; }
  const Tensor& q() const { return q_; }

  AttentionImage image(int64_t b) const {
    AttentionImage image{};
    image.queries = queries();
    image.keys = keys();
    image.patches = mask_.defined() ? AttentionPatches(height_, width_) : AttentionPatches(1, keys());
    image.heads = heads_;
    image.head_dim = channels() / heads_;
    image.dtype = dtype_;
    image.q = rows_of<const void>(q_, b);
    image.k = rows_of<const void>(k_, b);
    image.v = rows_of<const void>(v_, b);
    if (mask_.defined()) {
      const int64_t w = mask_.size(3);
      image.mask.first = {{mask_.data_ptr(), mask_dtype_, b * mask_.stride(0)}, mask_.size(2), w, w};
      image.mask.stride = mask_.stride(1);
      image.mask.resampling = table_.view();
    }
    if (padding_.defined()) image.mask.padding = data_of<const uint8_t>(padding_) + b * keys();
    image.scale = scale_;
    image.dropout = dropout_;
    image.seed = seed_;
    image.first_weight = static_cast<uint64_t>(b * heads_ * queries() * keys());
    return image;
  }

  // Calls run(b, part, task, workspace) for all images, their parts, and groups of heads, which it sets in the task.
  // There are as many tasks as threads, even if that splits the heads: each group of heads then finds the attended keys
  // again.
  template <typename Run>
  void for_each_task(int64_t parts_of_image, bool backward, const Run& run) const {
    if (batch() == 0) return;
    const int64_t tasks = std::max<int64_t>(batch() * parts_of_image, 1);
    const int64_t wanted = ceil_div(num_threads(), tasks);
    const int64_t heads_of_task = std::max<int64_t>(heads_ / std::max<int64_t>(wanted, 1), 1);
    const int64_t groups = ceil_div(heads_, heads_of_task);
    parallel_for(0, batch() * groups * parts_of_image, 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
      const auto work = scratch.lay_out<AttentionWorkspace>(image(0), backward);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts_of_image, first_head = i / parts_of_image % groups * heads_of_task;
        const AttentionTask task{0, 0, first_head, std::min(first_head + heads_of_task, heads_)};
        run(i / parts_of_image / groups, part, task, work);
      }
    });
  }

 private:
  void set_mask(const Tensor& logits) {
    check_tensor(logits.dim() == 4 && logits.size(0) == batch() && logits.size(1) == queries() && logits.size(2) > 0 &&
                     logits.size(3) > 0,
                 logits, "mask_logits", "(B, N, h, w) for the B and N of q, with at least one pixel");
    const int64_t h = logits.size(2), w = logits.size(3);
    const bool planes = (w == 1 || logits.stride(3) == 1) && (h == 1 || logits.stride(2) == w);
    mask_ = planes ? logits : torch::stable::contiguous(logits);
    mask_dtype_ = dtype_of(logits, "mask_logits");
    table_ = ResamplingTable(h, w, height_, width_);
  }

  Tensor q_, k_, v_, mask_, padding_;
  int64_t height_, width_, heads_;
  float scale_, dropout_;
  uint64_t seed_ = 0;
  Dtype dtype_, mask_dtype_ = Dtype::kFloat32;
  ResamplingTable table_;
};

// Backward divides the blocks of queries into at most this many parts, which run at the same time. Each needs memory
// for the gradients of all keys and values. Their number does not depend on that of the threads, so neither do the
// sums.
constexpr int64_t kMostParts = 2;

// Blocks of queries of about the same size.
struct QueryBlocks {
  int64_t queries, count, size;

  explicit QueryBlocks(int64_t queries)
      : queries(queries),
        count(ceil_div(queries, kAttentionQueries)),
        size(count == 0 ? 0 : ceil_div(queries, count)) {}

  AttentionTask task(AttentionTask heads, int64_t block) const {
    const int64_t first = std::min(block * size, queries);
    return {first, std::min(first + size, queries) - first, heads.first_head, heads.last_head};
  }
};

// The gradient of keys or values, as the sum of several parts.
class PartialGradient {
 public:
  PartialGradient(const Tensor& like, int64_t parts, int64_t batch, int64_t keys, int64_t channels)
      : total_(empty_result(like, {batch, keys, channels}, ScalarType::Float)),
        others_(empty_result(like, {(parts - 1) * batch, keys, channels}, ScalarType::Float)),
        batch_(batch) {}

  AttentionRows<float> rows(int64_t part, int64_t b) const {
    return part == 0 ? rows_of<float>(total_, b) : rows_of<float>(others_, (part - 1) * batch_ + b);
  }

  Tensor sum(ScalarType dtype) const {
    const int64_t size = total_.numel();
    float* const total = data_of<float>(total_);
    parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (const float* part = data_of<const float>(others_); part != data_of<const float>(others_) + others_.numel();
           part += size) {
        for (int64_t i = begin; i < end; ++i) total[i] += part[i];
      }
    });
    return dtype == ScalarType::Float ? total_ : torch::stable::to(total_, dtype);
  }

 private:
  Tensor total_, others_;
  int64_t batch_;
};

std::tuple<Tensor, Tensor> masked_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask_logits,
                                            std::optional<Tensor> key_padding_mask, int64_t grid_height,
                                            int64_t grid_width, int64_t num_heads, double scale, double dropout,
                                            std::optional<Tensor> seed) {
  const Attention attention(q, k, v, mask_logits, key_padding_mask, grid_height, grid_width, num_heads, scale, dropout,
                            seed);
  const int64_t queries = attention.queries();
  Tensor out = empty_result(q, {attention.batch(), queries, attention.channels()}, q.scalar_type());
  Tensor logsumexp = empty_result(q, {attention.batch(), num_heads, queries}, ScalarType::Double);
  double* logsumexp_data = data_of<double>(logsumexp);
  const QueryBlocks blocks(queries);
  if (blocks.count == 0) return {out, logsumexp};
  const auto kernel = FASTMASK_SELECT(masked_attention_forward);
  attention.for_each_task(blocks.count, false, [&](int64_t b, int64_t block, const auto& heads, const auto& work) {
    const AttentionForward result{rows_of<void>(out, b), logsumexp_data + b * num_heads * queries};
    kernel(attention.image(b), result, blocks.task(heads, block), work);
  });
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad_out, Tensor out, Tensor logsumexp, Tensor q,
                                                             Tensor k, Tensor v, std::optional<Tensor> mask_logits,
                                                             std::optional<Tensor> key_padding_mask,
                                                             int64_t grid_height, int64_t grid_width, int64_t num_heads,
                                                             double scale, double dropout, std::optional<Tensor> seed) {
  const Attention attention(q, k, v, mask_logits, key_padding_mask, grid_height, grid_width, num_heads, scale, dropout,
                            seed);
  const int64_t batch = attention.batch(), queries = attention.queries(), channels = attention.channels();
  grad_out = with_contiguous_rows(grad_out, "grad_out");
  out = with_contiguous_rows(out, "out");
  logsumexp = torch::stable::contiguous(logsumexp);
  for (const Tensor* tensor : {&grad_out, &out}) {
    check_tensor(tensor->size(0) == batch && tensor->size(1) == queries && tensor->size(2) == channels &&
                     tensor->scalar_type() == q.scalar_type(),
                 *tensor, "grad_out and out", "of the shape and dtype of q");
  }
  check_tensor(logsumexp.scalar_type() == ScalarType::Double && logsumexp.numel() == batch * num_heads * queries,
               logsumexp, "logsumexp", "(B, heads, N) float64");
  const double* logsumexp_data = data_of<const double>(logsumexp);
  Tensor grad_q = empty_result(q, {batch, queries, channels}, q.scalar_type());
  const QueryBlocks blocks(queries);
  if (blocks.count == 0) {
    const std::vector<int64_t> shape{batch, attention.keys(), channels};
    return {grad_q, zero_result(k, shape, q.scalar_type()), zero_result(v, shape, q.scalar_type())};
  }
  const int64_t parts = std::min(blocks.count, kMostParts);
  PartialGradient grad_k(k, parts, batch, attention.keys(), channels),
      grad_v(v, parts, batch, attention.keys(), channels);
  const auto kernel = FASTMASK_SELECT(masked_attention_backward);
  // One thread writes a head's keys, for one block of queries of the part after another.
  attention.for_each_task(parts, true, [&](int64_t b, int64_t part, const auto& heads, const auto& work) {
    AttentionBackward result{rows_of<const void>(out, b),
                             rows_of<const void>(grad_out, b),
                             logsumexp_data + b * num_heads * queries,
                             rows_of<void>(grad_q, b),
                             grad_k.rows(part, b),
                             grad_v.rows(part, b),
                             false};
    const AttentionImage image = attention.image(b);
    for (int64_t block = blocks.count * part / parts; block < blocks.count * (part + 1) / parts; ++block) {
      kernel(image, result, blocks.task(heads, block), work);
      result.adds = true;
    }
  });
  return {grad_q, grad_k.sum(q.scalar_type()), grad_v.sum(q.scalar_type())};
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("masked_attention", TORCH_BOX(&fastmask::masked_attention));
  library.impl("masked_attention_backward", TORCH_BOX(&fastmask::masked_attention_backward));
}
