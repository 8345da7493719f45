#include "cpu/semantic.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "ops/geometry.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

using torch::stable::parallel_for;

// The smallest of uint8, int16 and int32 that holds all classes.
ScalarType label_type(int64_t classes) {
  if (classes <= 256) return ScalarType::Byte;
  return classes <= 32768 ? ScalarType::Short : ScalarType::Int;
}

constexpr int64_t kChunkRows = 64;  // of pixels, for one thread at a time

// Beyond this, the class no longer fits beside a score in 32 bits.
constexpr int64_t kMostClassesToSkip = 4096;

std::atomic<bool> skip_queries{true};

std::tuple<Tensor, Tensor, Tensor, Tensor> semantic_inference(Tensor probabilities, Tensor mask_logits,
                                                              std::string order, std::string output, bool details,
                                                              Sizes grid, OptionalSizes padded_size,
                                                              OptionalSizes valid_size, Sizes size, int64_t in_top,
                                                              int64_t out_top, int64_t out_rows) {
  probabilities = torch::stable::contiguous(probabilities);
  STD_TORCH_CHECK(mask_logits.dim() == 4, "mask_logits must be (B, N, h, w)");
  const Dtype dtype = logit_dtype(mask_logits, "mask_logits");
  const int64_t batch = mask_logits.size(0), queries = mask_logits.size(1), h = mask_logits.size(2),
                w = mask_logits.size(3);
  if (w > 1 && mask_logits.stride(3) != 1) mask_logits = torch::stable::contiguous(mask_logits);
  STD_TORCH_CHECK(probabilities.dim() == 3 && probabilities.scalar_type() == ScalarType::Float &&
                      probabilities.size(0) == batch && probabilities.size(1) == queries && probabilities.size(2) > 0,
                  "probabilities must be (B, N, K) float32 for the B and N of mask_logits, K at least 1");
  STD_TORCH_CHECK(order == "masks" || order == "scores", "order must be masks or scores, got ", order);
  STD_TORCH_CHECK(output == "labels" || output == "scores", "output must be labels or scores, got ", output);
  STD_TORCH_CHECK(!details || output == "labels", "details come with labels");
  const Geometry geometry(h, w, grid, padded_size, valid_size, size, in_top, out_top, out_rows);
  const int64_t classes = probabilities.size(2), width = geometry.width(), rows = out_rows;

  const bool labels = output == "labels";
  Tensor result = labels ? torch::stable::new_empty(mask_logits, {batch, rows, width}, label_type(classes))
                         : torch::stable::new_empty(mask_logits, {batch, classes, rows, width}, ScalarType::Float);
  std::vector<int64_t> pixels{batch, rows, width};
  if (!details) pixels = {0};
  Tensor score = torch::stable::new_empty(mask_logits, pixels, ScalarType::Float);
  Tensor margin = torch::stable::new_empty(mask_logits, pixels, ScalarType::Float);
  Tensor nan_logits = torch::stable::new_empty(mask_logits, {batch, queries}, ScalarType::Int);
  int32_t* nans = static_cast<int32_t*>(nan_logits.data_ptr());

  AxisTaps row_taps = geometry.rows(), column_taps = geometry.columns();
  row_taps.count_from(in_top);
  const Taps row_view = row_taps.view(), column_view = column_taps.view();
  const int64_t strips = column_view.stride / kStrip, chunks = (rows + kChunkRows - 1) / kChunkRows;
  const bool skip = labels && !details && skip_queries.load(std::memory_order_relaxed) && queries > 1 &&
                    classes <= kMostClassesToSkip;
  std::vector<float> table_memory(class_table_floats(queries, classes));
  std::vector<float> cells(skip ? h * strips * to_full_vectors(queries) : 0);
  const auto cells_kernel = FASTMASK_SELECT(semantic_cells);
  const auto table_kernel = FASTMASK_SELECT(make_class_table);
  const auto strip_kernel = FASTMASK_SELECT(semantic_strip);
  for (int64_t b = 0; b < batch; ++b) {
    const MaskPlanes planes{mask_logits.data_ptr(),
                            dtype,
                            b * mask_logits.stride(0),
                            mask_logits.stride(1),
                            mask_logits.stride(2),
                            queries,
                            h,
                            w};
    parallel_for(0, queries, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(cells_scratch(w));
      for (int64_t n = begin; n < end; ++n) {
        nans[b * queries + n] =
            static_cast<int32_t>(cells_kernel(planes, n, column_view, skip ? cells.data() : nullptr, scratch.data()));
      }
    });
    const ClassTable table = table_kernel(static_cast<const float*>(probabilities.data_ptr()) + b * queries * classes,
                                          queries, classes, table_memory.data());
    SemanticMaps maps{};
    maps.rows = rows;
    maps.width = width;
    if (labels) {
      maps.label_bytes = classes <= 256 ? 1 : classes <= 32768 ? 2 : 4;
      maps.labels = static_cast<char*>(result.data_ptr()) + b * rows * width * maps.label_bytes;
    } else {
      maps.scores = static_cast<float*>(result.data_ptr()) + b * classes * rows * width;
    }
    if (details) {
      maps.score = static_cast<float*>(score.data_ptr()) + b * rows * width;
      maps.margin = static_cast<float*>(margin.data_ptr()) + b * rows * width;
    }
    parallel_for(0, strips * chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(semantic_scratch(queries, classes, w, row_view.taps));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t strip = item / chunks, top = item % chunks * kChunkRows;
        strip_kernel(planes, table, row_view, column_view, strip, top, std::min(top + kChunkRows, rows),
                     skip ? cells.data() : nullptr, maps, scratch.data());
      }
    });
  }
  return {result, score, margin, nan_logits};
}

bool set_query_skipping(bool on) { return skip_queries.exchange(on); }

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("semantic_inference", TORCH_BOX(&fastmask::semantic_inference));
}

STABLE_TORCH_LIBRARY_IMPL(fastmask, CompositeExplicitAutograd, library) {
  library.impl("_set_query_skipping", TORCH_BOX(&fastmask::set_query_skipping));
}
