#include "cpu/deformable_attention.h"

#include <algorithm>
#include <tuple>

#include "ops/parallel.h"
#include "ops/tensors.h"

namespace fastmask {
namespace {

constexpr int64_t kQueries = 64;        // of a task
constexpr int64_t kMostSide = 1 << 24;  // of a level: float has every integer up to this
constexpr int64_t kPixels = 512;        // of a task that copies them

// The arguments that forward and backward share, checked. A plane is one head of one image.
class Deformable {
 public:
  Deformable(const Tensor& value, const Tensor& locations, const Tensor& weights, const std::vector<int64_t>& shapes)
      : value_(with_contiguous_rows(value)),
        locations_(torch::stable::contiguous(locations)),
        weights_(torch::stable::contiguous(weights)),
        dtype_(dtype_of(value, "value")) {
    check_tensor(heads() > 0 && dim() > 0, value, "value", "(B, S, heads, dim) with at least one head and channel");
    STD_TORCH_CHECK(!shapes.empty() && shapes.size() % 2 == 0,
                    "spatial_shapes must have a height and a width for each of at least one level");
    check_tensor(
        locations.dim() == 6 && locations.scalar_type() == ScalarType::Float && locations.size(0) == batch() &&
            locations.size(2) == heads() && locations.size(3) == static_cast<int64_t>(shapes.size()) / 2 &&
            locations.size(4) > 0 && locations.size(4) < INT32_MAX / locations.size(3) && locations.size(5) == 2,
        locations, "sampling_locations", "(B, Q, heads, L, P, 2) float32 for the B and heads of value and L levels");
    bool same = weights.dim() == 5 && weights.scalar_type() == ScalarType::Float;
    for (int d = 0; same && d < 5; ++d) same = weights.size(d) == locations.size(d);
    check_tensor(same, weights, "attention_weights", "(B, Q, heads, L, P) float32, as sampling_locations");
    set_levels(shapes);
  }

  int64_t batch() const { return value_.size(0); }
  int64_t heads() const { return value_.size(2); }
  int64_t dim() const { return value_.size(3); }
  int64_t queries() const { return locations_.size(1); }
  int64_t planes() const { return batch() * heads(); }
  int64_t blocks() const { return ceil_div(queries(), kQueries); }

  DeformableLevels levels() const {
    return {value_.size(1), locations_.size(3) * locations_.size(4),
            dim(),          to_full_vectors(dim()),
            width_.data(),  height_.data(),
            start_.data()};
  }

  // The floats of a head's rows.
  int64_t plane_size() const { return (value_.size(1) + 1) * to_full_vectors(dim()); }

  // The first point of a plane, in the locations and weights.
  int64_t first_point(int64_t plane) const {
    return (plane / heads() * queries() * heads() + plane % heads()) * levels().points;
  }

  DeformableHead head(int64_t plane, const float* packed) const {
    const int64_t first = first_point(plane);
    return {packed == nullptr ? nullptr : packed + plane * plane_size(), data_of<const float>(locations_) + 2 * first,
            data_of<const float>(weights_) + first, heads() * levels().points};
  }

  // The rows of a plane in a tensor (B, S, heads, dim), or (B, Q, heads * dim).
  template <typename T>
  DeformableRows<T> rows_of(const Tensor& tensor, int64_t plane) const {
    const int64_t head_stride = tensor.dim() == 4 ? tensor.stride(2) : dim();
    const int64_t offset = plane / heads() * tensor.stride(0) + plane % heads() * head_stride;
    return {static_cast<T*>(tensor.data_ptr()), dtype_, offset, tensor.stride(1)};
  }

  // A float tensor that holds the rows of all planes; zeros, or else arbitrary values.
  Tensor new_planes(bool zeros) const {
    const std::vector<int64_t> shape{planes(), plane_size()};
    const Tensor tensor = empty_result(value_, shape, ScalarType::Float);
    if (tensor.numel() == 0) return tensor;
    if (zeros) {
      parallel_for(0, planes(), 1, [&](int64_t begin, int64_t end) {
        std::fill(data_of<float>(tensor) + begin * shape[1], data_of<float>(tensor) + end * shape[1], 0.0f);
      });
    }
    return tensor;
  }

  Tensor packed_value() const {
    const Tensor packed = new_planes(false);
    const auto kernel = FASTMASK_SELECT(deformable_pack);
    parallel_for(0, planes(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        kernel(levels(), rows_of<const void>(value_, plane), data_of<float>(packed) + plane * plane_size());
      }
    });
    return packed;
  }

  // Calls run(plane, first query, query after the last, workspace) for blocks of queries.
  template <typename Run>
  void for_each_block(const Run& run) const {
    parallel_for(0, planes() * blocks(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
      const auto work = scratch.lay_out<DeformableWorkspace>(levels());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks() * kQueries;
        run(i / blocks(), first, std::min(first + kQueries, queries()), work);
      }
    });
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& value) {
    check_tensor(value.dim() == 4, value, "value", "(B, S, heads, dim)");
    return value.size(3) <= 1 || value.stride(3) == 1 ? value : torch::stable::contiguous(value);
  }

  void set_levels(const std::vector<int64_t>& shapes) {
    const int64_t points = locations_.size(4), pixels = value_.size(1);
    STD_TORCH_CHECK(pixels < INT32_MAX, "value must have less than 2^31 - 1 pixels, got ", pixels);
    const int64_t padded = to_full_vectors(static_cast<int64_t>(shapes.size()) / 2 * points);
    width_.assign(padded, 1.0f);
    height_.assign(padded, 1.0f);
    start_.assign(padded, 0);
    int64_t start = 0;
    for (size_t level = 0; level < shapes.size() / 2; ++level) {
      const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
      // Divisions, as products might overflow.
      STD_TORCH_CHECK(height > 0 && width > 0 && height <= std::min(pixels, kMostSide) && width <= kMostSide &&
                          width <= (pixels - start) / height,
                      "spatial_shapes must have positive sizes of at most ", kMostSide,
                      ", whose products add up to the ", pixels, " pixels of value");
      const auto first = static_cast<int64_t>(level) * points;
      std::fill_n(width_.begin() + first, points, static_cast<float>(width));
      std::fill_n(height_.begin() + first, points, static_cast<float>(height));
      std::fill_n(start_.begin() + first, points, static_cast<int32_t>(start));
      start += height * width;
    }
    STD_TORCH_CHECK(start == pixels, "spatial_shapes has ", start, " pixels in all, value ", pixels);
  }

  Tensor value_, locations_, weights_;
  Dtype dtype_;
  std::vector<float> width_, height_;
  std::vector<int32_t> start_;
};

Tensor deformable_attention(Tensor value, Tensor sampling_locations, Tensor attention_weights,
                            std::vector<int64_t> spatial_shapes) {
  const Deformable attention(value, sampling_locations, attention_weights, spatial_shapes);
  Tensor out = empty_result(value, {attention.batch(), attention.queries(), attention.heads() * attention.dim()},
                            value.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor packed = attention.packed_value();
  const auto kernel = FASTMASK_SELECT(deformable_attention_forward);
  attention.for_each_block([&](int64_t plane, int64_t first, int64_t last, const auto& work) {
    kernel(attention.levels(), attention.head(plane, data_of<const float>(packed)), first, last, work,
           attention.rows_of<void>(out, plane));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(Tensor grad_out, Tensor value,
                                                                 Tensor sampling_locations, Tensor attention_weights,
                                                                 std::vector<int64_t> spatial_shapes) {
  const Deformable attention(value, sampling_locations, attention_weights, spatial_shapes);
  const int64_t batch = attention.batch(), queries = attention.queries(), heads = attention.heads();
  const int64_t planes = attention.planes(), dim = attention.dim();
  const DeformableLevels levels = attention.levels();
  check_tensor(grad_out.dim() == 3 && grad_out.scalar_type() == value.scalar_type() && grad_out.size(0) == batch &&
                   grad_out.size(1) == queries && grad_out.size(2) == heads * dim,
               grad_out, "grad_out", "(B, Q, heads * dim) in the dtype of value");
  grad_out = torch::stable::contiguous(grad_out);
  Tensor grad_locations = empty_result(
      value, {batch, queries, heads, sampling_locations.size(3), sampling_locations.size(4), 2}, ScalarType::Float);
  Tensor grad_weights = empty_result(
      value, {batch, queries, heads, sampling_locations.size(3), sampling_locations.size(4)}, ScalarType::Float);
  if (grad_locations.numel() > 0) {
    const Tensor packed = attention.packed_value();
    const auto kernel = FASTMASK_SELECT(deformable_attention_point_gradients);
    attention.for_each_block([&](int64_t plane, int64_t first, int64_t last, const auto& work) {
      const int64_t at = attention.first_point(plane);
      kernel(levels, attention.head(plane, data_of<const float>(packed)), first, last, work,
             attention.rows_of<const void>(grad_out, plane), data_of<float>(grad_locations) + 2 * at,
             data_of<float>(grad_weights) + at);
    });
  }

  Tensor grad_value = empty_result(value, {batch, levels.pixels, heads, dim}, value.scalar_type());
  if (grad_value.numel() == 0) return {grad_value, grad_locations, grad_weights};
  const Tensor planes_of_grad = attention.new_planes(true);
  float* const grad = data_of<float>(planes_of_grad);
  // One thread adds up a plane, query by query, so that the sums do not depend on the number of threads; of few planes
  // it adds up some of the channels.
  const int64_t vectors = levels.channels / kMostLanes;
  const int64_t wanted = ceil_div(num_threads(), planes);
  const int64_t vectors_of_group = ceil_div(vectors, std::min(std::max<int64_t>(wanted, 1), vectors));
  const int64_t groups = ceil_div(vectors, vectors_of_group);
  const auto add = FASTMASK_SELECT(deformable_attention_value_gradient);
  parallel_for(0, planes * groups, 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<DeformableWorkspace>(levels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / groups, first = i % groups * vectors_of_group;
      const int64_t last = std::min(first + vectors_of_group, vectors);
      add(levels, attention.head(plane, nullptr), queries, first * kMostLanes, last * kMostLanes, work,
          attention.rows_of<const void>(grad_out, plane), grad + plane * attention.plane_size());
    }
  });
  const int64_t parts = ceil_div(levels.pixels, kPixels);
  const auto unpack = FASTMASK_SELECT(deformable_unpack);
  parallel_for(0, planes * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / parts, first = i % parts * kPixels;
      unpack(levels, grad + plane * attention.plane_size(), first, std::min(first + kPixels, levels.pixels),
             attention.rows_of<void>(grad_value, plane));
    }
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("deformable_attention", TORCH_BOX(&fastmask::deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&fastmask::deformable_attention_backward));
}
