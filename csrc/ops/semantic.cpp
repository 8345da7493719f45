#include "cpu/semantic.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "ops/geometry.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

constexpr int64_t kBandRows = 32;  // the most rows of pixels in a band, which one thread processes at a time
constexpr int64_t kBands = 16;     // the fewest bands, if that leaves kFewRows in each
constexpr int64_t kFewRows = 4;

// With order "scores" a thread holds the scores of a part of the valid grid: about this many columns, and as many rows
// as fit in this many floats.
constexpr int64_t kPanelColumns = 512;
constexpr int64_t kPanelFloats = 1 << 20;

// With more classes, a class no longer fits in 32 bits together with its score.
constexpr int64_t kMostClassesToSkip = 4096;

std::atomic<bool> skip_queries{true};

// The smallest of uint8, int16 and int32 that holds all classes.
ScalarType label_type(int64_t classes) {
  if (classes <= 256) return ScalarType::Byte;
  return classes <= 32768 ? ScalarType::Short : ScalarType::Int;
}

// Memory for the class probabilities [queries, classes] of one image in the layouts of ClassTable.
class ClassTableMemory {
 public:
  ClassTableMemory() = default;
  ClassTableMemory(const float* probabilities, int64_t queries, int64_t classes)
      : queries_(queries),
        classes_(classes),
        blocks_(queries * classes),
        rows_(queries * to_full_vectors(classes)),
        middles_(queries),
        peaks_(to_full_vectors(queries)) {
    float* at = blocks_.data();
    for (int64_t block = 0, k = 0; block < class_blocks(classes); ++block) {
      const int64_t count = class_block_size(classes, block);
      for (int64_t n = 0; n < queries; ++n) at = std::copy_n(probabilities + n * classes + k, count, at);
      k += count;
    }
    std::vector<float> sorted(classes);
    for (int64_t n = 0; n < queries; ++n) {
      const float* row = probabilities + n * classes;
      peaks_[n] = *std::max_element(row, row + classes);
      if (std::any_of(row, row + classes, [](float p) { return std::isnan(p); })) {
        peaks_[n] = middles_[n] = NAN;
      } else {
        std::copy_n(row, classes, sorted.begin());
        std::nth_element(sorted.begin(), sorted.begin() + classes / 2, sorted.end());
        middles_[n] = sorted[classes / 2];
      }
      float* padded = rows_.data() + n * to_full_vectors(classes);
      std::fill(std::copy_n(row, classes, padded), padded + to_full_vectors(classes), middles_[n]);
    }
  }

  ClassTable view() const { return {queries_, classes_, blocks_.data(), rows_.data(), middles_.data(), peaks_.data()}; }

 private:
  int64_t queries_ = 0, classes_ = 0;
  std::vector<float> blocks_, rows_, middles_, peaks_;
};

// A band of logits in the layout that the kernels read.
struct Band {
  PackedLogits packed;
  PackWorkspace pack;

  // Allocates the rows [top, end) of the logits for all strips of pixels of `columns` and, if requested, their `cells`.
  void lay_out(Carver& carver, const MaskPlanes& planes, const Taps& columns, int64_t top, int64_t end, bool cells) {
    packed.top = top;
    packed.rows = end - top;
    packed.strips = columns.stride / kStrip;
    packed.queries = planes.queries;
    packed.stride = 0;
    for (int64_t strip = 0; strip < packed.strips; ++strip) {
      packed.stride = std::max(packed.stride, strip_span(columns, strip).count);
    }
    carver.take(packed.logits, packed.strips * packed.rows * packed.queries * packed.stride + 32);
    packed.cells = nullptr;
    if (cells) carver.take(packed.cells, packed.rows * packed.strips * to_full_vectors(packed.queries));
    pack.lay_out(carver, planes.first.w);
  }

  // Fills the band. NaN logits of the rows [top, count_end) are added to nans[queries].
  void fill(const MaskPlanes& planes, const Taps& columns, int64_t count_end, int32_t* nans) const {
    FASTMASK_SELECT(pack_logits)
    (planes, columns, packed.top, std::max(packed.top + packed.rows, count_end), count_end, packed, nans, pack);
  }
};

struct MixWorkspace {
  Band band;
  SemanticWorkspace semantic;

  void lay_out(Carver& carver, const MaskPlanes& planes, int64_t classes, const Taps& rows, const Taps& columns,
               int64_t top, int64_t end, bool cells) {
    band.lay_out(carver, planes, columns, top, end, cells);
    semantic.lay_out(carver, planes.queries, classes, rows.taps);
  }
};

struct ScoresWorkspace {
  MixWorkspace mix;
  float* scores;  // [rows, classes, columns], followed by 32 readable floats
  float* row;     // [columns], the same

  void lay_out(Carver& carver, const MaskPlanes& planes, int64_t classes, const Taps& rows, const Taps& columns,
               int64_t top, int64_t end) {
    mix.lay_out(carver, planes, classes, rows, columns, top, end, false);
    carver.take(scores, rows.out * classes * columns.stride + 32);
    carver.take(row, columns.stride + 32);
  }
};

// The first row of logits that each band of pixel rows reads, followed by the end of the logits.
std::vector<int64_t> band_tops(const Taps& rows, int64_t height, int64_t logit_rows) {
  std::vector<int64_t> tops{0};
  for (int64_t y = height; y < rows.out; y += height) tops.push_back(rows.index[y]);
  tops.push_back(logit_rows);
  return tops;
}

// One image: its mask logits, class probabilities and results.
struct SemanticImage {
  MaskPlanes planes;
  ClassTableMemory table;
  SemanticMaps maps;
  int32_t* nan_logits;  // [queries]
};

// Adds up the counts of the bands of each image, which are separate so that no two threads add to the same number.
void add_nans(const std::vector<int32_t>& nans, const std::vector<SemanticImage>& images) {
  const int32_t* count = nans.data();
  for (const SemanticImage& image : images) {
    for (size_t i = 0; i < nans.size() / images.size(); ++i) image.nan_logits[i % image.planes.queries] += *count++;
  }
}

void mix_masks(const std::vector<SemanticImage>& images, const Taps& rows, const Taps& columns, bool skip) {
  const int64_t batch = static_cast<int64_t>(images.size()), queries = images[0].planes.queries;
  const int64_t height = std::clamp(ceil_div(rows.out, kBands), kFewRows, kBandRows);
  const std::vector<int64_t> tops = band_tops(rows, height, images[0].planes.first.h);
  const int64_t bands = static_cast<int64_t>(tops.size()) - 1;
  std::vector<int32_t> nans(batch * bands * queries);
  const auto kernel = FASTMASK_SELECT(semantic_strip);
  parallel_for(0, batch * bands, 1, [&](int64_t first, int64_t last, Scratch& scratch) {
    for (int64_t item = first; item < last; ++item) {
      const SemanticImage& image = images[item / bands];
      const ClassTable table = image.table.view();
      const int64_t i = item % bands, begin = i * height, end = std::min(begin + height, rows.out);
      const int64_t read_end = rows.index[(rows.taps - 1) * rows.stride + end - 1] + 1;
      const auto work =
          scratch.lay_out<MixWorkspace>(image.planes, table.classes, rows, columns, tops[i], read_end, skip);
      work.band.fill(image.planes, columns, tops[i + 1], nans.data() + item * queries);
      for (int64_t strip = 0; strip < work.band.packed.strips; ++strip) {
        kernel(work.band.packed, table, rows, columns, strip, begin, end, image.maps, work.semantic);
      }
    }
  });
  add_nans(nans, images);
}

void count_nans(const std::vector<SemanticImage>& images, const Taps& columns) {
  const auto kernel = FASTMASK_SELECT(pack_logits);
  const int64_t batch = static_cast<int64_t>(images.size()), queries = images[0].planes.queries;
  std::vector<int32_t> nans(batch * kBands * queries);
  parallel_for(0, batch * kBands, 1, [&](int64_t first, int64_t last, Scratch& scratch) {
    const auto work = scratch.lay_out<PackWorkspace>(images[0].planes.first.w);
    for (int64_t item = first; item < last; ++item) {
      const MaskPlanes& planes = images[item / kBands].planes;
      const int64_t i = item % kBands;
      const int64_t begin = planes.first.h * i / kBands, end = planes.first.h * (i + 1) / kBands;
      kernel(planes, columns, begin, end, end, PackedLogits{}, nans.data() + item * queries, work);
    }
  });
  add_nans(nans, images);
}

void mix_scores(const std::vector<SemanticImage>& images, const Geometry& geometry) {
  const SemanticMaps& size = images[0].maps;
  const int64_t batch = static_cast<int64_t>(images.size()), classes = images[0].table.view().classes;
  const int64_t panels = ceil_div(geometry.valid_width(), kPanelColumns);
  const int64_t width = ceil_div(size.width, panels);
  const int64_t row_floats = classes * std::min(geometry.valid_width(), kPanelColumns + 2);
  const TapTable all_rows = geometry.rows_of_valid(0, size.rows);
  const double scale = static_cast<double>(size.rows) / (all_rows.end() - all_rows.first());
  const int64_t height =
      std::clamp<int64_t>(static_cast<int64_t>(scale * (kPanelFloats / row_floats - 2)), 1, kBandRows);
  const int64_t chunks = ceil_div(size.rows, height);
  const auto grid_kernel = FASTMASK_SELECT(semantic_grid_scores);
  const auto resample_kernel = FASTMASK_SELECT(semantic_resample_scores);
  parallel_for(0, batch * panels * chunks, 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t item = begin; item < end; ++item) {
      const auto& [planes, memory, maps, nan_logits] = images[item / (panels * chunks)];
      const ClassTable table = memory.view();
      const int64_t top = item % chunks * height, left = item / chunks % panels * width;
      if (left >= maps.width) continue;
      TapTable rows = geometry.rows_of_valid(top, std::min(height, maps.rows - top));
      TapTable columns = geometry.columns_of_valid(left, std::min(width, maps.width - left));
      const TapTable grid_rows = geometry.valid_rows(rows.first(), rows.end());
      const TapTable grid_columns = geometry.valid_columns(columns.first(), columns.end());
      rows.count_from(rows.first());
      columns.count_from(columns.first());
      const Taps row_view = grid_rows.view(), column_view = grid_columns.view();
      const auto work = scratch.lay_out<ScoresWorkspace>(planes, table.classes, row_view, column_view,
                                                         grid_rows.first(), grid_rows.end());
      work.mix.band.fill(planes, column_view, 0, nullptr);
      grid_kernel(work.mix.band.packed, table, row_view, column_view, work.scores, work.mix.semantic);
      resample_kernel(work.scores, table.classes, column_view.stride, rows.view(), columns.view(), top, left, maps,
                      work.row);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> semantic_inference(Tensor probabilities, Tensor mask_logits,
                                                              std::string order, std::string output, bool details,
                                                              Sizes grid, OptionalSizes padded_size,
                                                              OptionalSizes valid_size, Sizes size, int64_t in_top,
                                                              int64_t out_top, int64_t out_rows) {
  probabilities = torch::stable::contiguous(probabilities);
  const QueryPlanes mask_planes(mask_logits);
  const int64_t batch = mask_planes.batch(), queries = mask_planes.queries();
  check_tensor(probabilities.dim() == 3 && probabilities.scalar_type() == ScalarType::Float &&
                   probabilities.size(0) == batch && probabilities.size(1) == queries && probabilities.size(2) > 0,
               probabilities, "probabilities", "(B, N, K) float32 for the B and N of mask_logits, K at least 1");
  STD_TORCH_CHECK(order == "masks" || order == "scores", "order must be masks or scores, got ", order);
  STD_TORCH_CHECK(output == "labels" || output == "scores", "output must be labels or scores, got ", output);
  STD_TORCH_CHECK(!details || output == "labels", "details come with labels");
  const Geometry geometry(mask_planes.rows(), mask_planes.w(), grid, padded_size, valid_size, size, in_top, out_top,
                          out_rows);
  const int64_t classes = probabilities.size(2), width = geometry.width();

  const bool labels = output == "labels";
  Tensor result = labels ? empty_result(mask_logits, {batch, out_rows, width}, label_type(classes))
                         : empty_result(mask_logits, {batch, classes, out_rows, width}, ScalarType::Float);
  std::vector<int64_t> detail_shape{0};
  if (details) detail_shape = {batch, out_rows, width};
  Tensor score = empty_result(mask_logits, detail_shape, ScalarType::Float);
  Tensor margin = empty_result(mask_logits, detail_shape, ScalarType::Float);
  Tensor nan_logits = zero_result(mask_logits, {batch, queries}, ScalarType::Int);

  const TapTable rows = geometry.rows(), columns = geometry.columns();
  const bool skip = order == "masks" && labels && !details && queries > 1 && classes <= kMostClassesToSkip &&
                    skip_queries.load(std::memory_order_relaxed);
  const int64_t pixels = out_rows * width;
  std::vector<SemanticImage> images(batch);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      SemanticMaps maps{};
      maps.rows = out_rows;
      maps.width = width;
      if (labels) {
        maps.label_bytes = classes <= 256 ? 1 : classes <= 32768 ? 2 : 4;
        maps.labels = data_of<char>(result) + b * pixels * maps.label_bytes;
      } else {
        maps.scores = data_of<float>(result) + b * classes * pixels;
      }
      if (details) {
        maps.score = data_of<float>(score) + b * pixels;
        maps.margin = data_of<float>(margin) + b * pixels;
      }
      images[b] = {{mask_planes.plane(b, 0), queries, mask_planes.query_stride()},
                   {data_of<const float>(probabilities) + b * queries * classes, queries, classes},
                   maps,
                   data_of<int32_t>(nan_logits) + b * queries};
    }
  });
  if (batch == 0) return {result, score, margin, nan_logits};
  if (order == "masks") {
    mix_masks(images, rows.view(), columns.view(), skip);
  } else {
    count_nans(images, columns.view());
    mix_scores(images, geometry);
  }
  return {result, score, margin, nan_logits};
}

bool set_query_skipping(bool on) { return skip_queries.exchange(on); }

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) { library.impl("semantic_inference", TORCH_BOX(&fastmask::semantic_inference)); }

FASTMASK_LIBRARY_IMPL(CompositeExplicitAutograd, library) {
  library.impl("_set_query_skipping", TORCH_BOX(&fastmask::set_query_skipping));
}
