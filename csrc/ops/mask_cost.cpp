// fastmask::mask_cost, at all pixels of the mask logits, and fastmask::point_mask_cost, at points.
#include "cpu/mask_cost.h"

#include <algorithm>

#include "cpu/point_mask_cost.h"
#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

// The arguments except the points, and the result.
struct MaskCost {
  Tensor class_logits;
  MaskLogits mask_logits;
  BatchTargets targets;
  MaskCostRule rule;
  Dtype class_dtype;
  int64_t batch, queries, classes, max_targets;
  Tensor cost;

  Logits class_logits_of(int64_t row) const { return {class_logits.data_ptr(), class_dtype, row * classes}; }

  // The costs of row (l * B + b) * N + n, with zeros for padding.
  float* costs_of(int64_t row, int64_t image_targets) const {
    float* const costs = data_of<float>(cost) + row * max_targets;
    std::fill(costs + image_targets, costs + max_targets, 0.0f);
    return costs;
  }
};

// What all layers and queries of an image share, for each image of a batch: make(b, band, bands) makes a part, and
// join(parts, bands, b) the whole of them. There are parts for all threads; the whole does not depend on their
// number.
template <typename Make, typename Join>
auto prepare_images(int64_t batch, const Make& make, const Join& join) {
  using Prepared = decltype(make(0, 0, 1));
  if (batch == 0) return std::vector<Prepared>();
  const int64_t bands = ceil_div(num_threads(), batch);
  std::vector<Prepared> parts(batch * bands), whole(batch);
  parallel_for(0, batch * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[i] = make(i / bands, i % bands, bands);
  });
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) whole[b] = join(&parts[b * bands], bands, b);
  });
  return whole;
}

Tensor fill(const MaskCost& given) {
  const int64_t h = given.mask_logits.h(), w = given.mask_logits.w();
  const auto coverage = prepare_images(
      given.batch,
      [&](int64_t b, int64_t band, int64_t bands) { return make_coverage(given.targets.image(b), h, w, band, bands); },
      [](Coverage* parts, int64_t bands, int64_t) { return join_bands(parts, bands); });
  const auto row_kernel = FASTMASK_SELECT(mask_cost_row);
  parallel_for(0, given.mask_logits.rows(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<MaskCostWorkspace>(given.max_targets);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / given.queries % given.batch;
      const CoverageView view = coverage[b].view();
      row_kernel(given.class_logits_of(row), given.classes, given.mask_logits.plane(row).logits, h * w,
                 given.targets.labels(b), view, given.rule, work, given.costs_of(row, view.targets));
    }
  });
  return given.cost;
}

Tensor fill(const MaskCost& given, Tensor points) {
  const int64_t batch = given.batch, queries = given.queries;
  const int64_t h = given.mask_logits.h(), w = given.mask_logits.w();
  points = torch::stable::contiguous(points);
  check_tensor(
      points.dim() == 3 && points.size(0) == batch && points.size(2) == 2 && points.scalar_type() == ScalarType::Float,
      points, "points", "(B, P, 2) float32 for the B of mask_logits");
  const int64_t num_points = points.size(1);
  STD_TORCH_CHECK(num_points <= UINT32_MAX, "points has ", num_points, " points; expected at most ", UINT32_MAX);
  const auto sets = prepare_images(
      batch,
      [&](int64_t b, int64_t band, int64_t bands) {
        const float* of_image = data_of<const float>(points) + b * num_points * 2;
        return make_point_set(of_image, num_points, given.targets.image(b), h, w, band, bands);
      },
      [&](PointSet* parts, int64_t bands, int64_t b) {
        return join_bands(parts, bands, given.targets.image(b).count);
      });

  const int64_t lanes = FASTMASK_SELECT(point_mask_cost_lanes)();
  const auto group_kernel = FASTMASK_SELECT(point_mask_cost_group);
  const int64_t rows = given.mask_logits.layers() * queries, groups = ceil_div(rows, lanes);  // of one image
  parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<PointMaskCostWorkspace>(given.max_targets, w);
    Logits class_rows[kMostLanes];
    Plane planes[kMostLanes];
    float* cost_rows[kMostLanes];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups, first = i % groups * lanes, count = std::min(lanes, rows - first);
      const PointView view = sets[b].view();
      for (int64_t k = 0; k < count; ++k) {
        const int64_t row = ((first + k) / queries * batch + b) * queries + (first + k) % queries;
        class_rows[k] = given.class_logits_of(row);
        planes[k] = given.mask_logits.plane(row);
        cost_rows[k] = given.costs_of(row, view.targets);
      }
      group_kernel(class_rows, given.classes, planes, count, given.targets.labels(b), view, given.rule, work,
                   cost_rows);
    }
  });
  return given.cost;
}

// Points is a tensor type, or nothing.
template <class... Points>
struct MaskCostOperator {
  static Tensor call(Tensor class_logits, Tensor mask_logits, Tensor labels, std::optional<Tensor> masks,
                     std::optional<Tensor> segments, std::optional<Tensor> valid, int64_t void_value, bool ignore_void,
                     Points... points, double cost_class, double cost_mask, double cost_dice, std::string term_name,
                     double alpha, double gamma) {
    const MaskLogits logits(mask_logits);
    const BatchTargets targets(labels, masks, segments, valid, void_value, ignore_void, logits);
    const MaskCostRule rule{mask_term(term_name, alpha, gamma), static_cast<float>(cost_class),
                            static_cast<float>(cost_mask), static_cast<float>(cost_dice)};
    class_logits = torch::stable::contiguous(class_logits);
    const int64_t layers = logits.layers(), batch = logits.batch(), queries = logits.queries();
    check_tensor(class_logits.dim() == 4 && class_logits.size(3) > 0 && class_logits.size(0) == layers &&
                     class_logits.size(1) == batch && class_logits.size(2) == queries,
                 class_logits, "class_logits", "(L, B, N, K+1) for the L, B and N of mask_logits");
    const int64_t classes = class_logits.size(3), max_targets = targets.max_targets();
    for (int64_t i = 0; i < batch * max_targets; ++i) {
      STD_TORCH_CHECK(targets.labels(0)[i] < classes, "labels holds ", targets.labels(0)[i], "; expected less than ",
                      classes);
    }
    const Tensor cost = empty_result(mask_logits, {layers, batch, queries, max_targets}, ScalarType::Float);
    return fill({class_logits, logits, targets, rule, dtype_of(class_logits, "class_logits"), batch, queries, classes,
                 max_targets, cost},
                points...);
  }
};

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("mask_cost", TORCH_BOX(&fastmask::MaskCostOperator<>::call));
  library.impl("point_mask_cost", TORCH_BOX(&fastmask::MaskCostOperator<fastmask::Tensor>::call));
}
