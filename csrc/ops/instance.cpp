#include "cpu/instance.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "common/rle.h"
#include "cpu/count_nan.h"
#include "ops/geometry.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> instance_masks(Tensor mask_logits, Tensor queries, bool packed,
                                                                  Sizes grid, OptionalSizes padded_size,
                                                                  OptionalSizes valid_size, Sizes size, int64_t in_top,
                                                                  int64_t out_top, int64_t out_rows) {
  const QueryPlanes planes(mask_logits);
  const Geometry geometry(planes.rows(), planes.w(), grid, padded_size, valid_size, size, in_top, out_top, out_rows);
  queries = torch::stable::contiguous(queries);
  check_tensor(queries.dim() == 2 && queries.scalar_type() == ScalarType::Long && queries.size(0) == planes.batch(),
               queries, "queries", "(B, R) int64 for the B of mask_logits");
  const int64_t batch = planes.batch(), picks = queries.size(1), width = geometry.width();
  STD_TORCH_CHECK(out_rows * width <= INT32_MAX, "out_rows x W must be less than 2^31 pixels");
  const int64_t* query = data_of<const int64_t>(queries);
  // For each pick, the image's first pick with the same query, the only one that is computed; -1 for padding.
  std::vector<int64_t> first(batch * picks, -1), found(planes.queries());
  for (int64_t b = 0; b < batch; ++b) {
    std::fill(found.begin(), found.end(), -1);
    for (int64_t i = b * picks; i < (b + 1) * picks; ++i) {
      STD_TORCH_CHECK(query[i] >= -1 && query[i] < planes.queries(), "queries holds ", query[i],
                      "; expected -1 or a query less than ", planes.queries());
      if (query[i] < 0) continue;
      if (found[query[i]] < 0) found[query[i]] = i;
      first[i] = found[query[i]];
    }
  }

  const int64_t row_bytes = packed ? ceil_div(width, 8) : width, mask_bytes = out_rows * row_bytes;
  Tensor masks =
      empty_result(queries, {batch, picks, out_rows, row_bytes}, packed ? ScalarType::Byte : ScalarType::Bool);
  Tensor foreground = empty_result(queries, {batch, picks}, ScalarType::Float);
  Tensor area = empty_result(queries, {batch, picks}, ScalarType::Int);
  Tensor boxes = empty_result(queries, {batch, picks, 4}, ScalarType::Int);
  Tensor nan_logits = empty_result(queries, {batch, picks}, ScalarType::Int);
  uint8_t* mask_data = data_of<uint8_t>(masks);
  float* foreground_data = data_of<float>(foreground);
  int32_t* area_data = data_of<int32_t>(area);
  int32_t* box_data = data_of<int32_t>(boxes);
  int32_t* nan_data = data_of<int32_t>(nan_logits);

  const TilePlans plans = tile_plans(geometry, false);
  std::vector<std::vector<TilePlan>> bands;
  for (int64_t band = 0; band < plans.bands(); ++band) bands.push_back(plans.band(band));
  const auto band_kernel = FASTMASK_SELECT(instance_band);
  const auto nan_kernel = FASTMASK_SELECT(count_nan);
  parallel_for(0, batch * picks, 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<InstanceWorkspace>(plans, planes.w());
    for (int64_t i = begin; i < end; ++i) {
      const MaskRows mask{mask_data + i * mask_bytes, row_bytes, packed};
      if (first[i] < 0) memset(mask.data, 0, mask_bytes);
      if (first[i] >= 0 && first[i] != i) continue;
      InstanceSums sums;
      int64_t nans = 0;
      if (first[i] == i) {
        const Plane plane = planes.plane(i / picks, query[i]);
        nans = nan_kernel(plane);
        for (const std::vector<TilePlan>& band : bands) {
          band_kernel(plane, band.data(), plans.columns(), work, mask, sums);
        }
      }
      foreground_data[i] = static_cast<float>(sums.foreground);
      area_data[i] = static_cast<int32_t>(sums.area);
      nan_data[i] = static_cast<int32_t>(nans);
      int32_t* box = box_data + 4 * i;
      box[0] = sums.area > 0 ? static_cast<int32_t>(sums.left) : 0;
      box[1] = sums.area > 0 ? static_cast<int32_t>(out_top + sums.top) : 0;
      box[2] = static_cast<int32_t>(sums.right);
      box[3] = sums.area > 0 ? static_cast<int32_t>(out_top + sums.bottom) : 0;
    }
  });
  parallel_for(0, batch * picks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (first[i] < 0 || first[i] == i) continue;
      memcpy(mask_data + i * mask_bytes, mask_data + first[i] * mask_bytes, mask_bytes);
      foreground_data[i] = foreground_data[first[i]];
      area_data[i] = area_data[first[i]];
      nan_data[i] = nan_data[first[i]];
      memcpy(box_data + 4 * i, box_data + 4 * first[i], 4 * sizeof(int32_t));
    }
  });
  return {masks, foreground, area, boxes, nan_logits};
}

Tensor resize_masks(Tensor masks, Sizes size) {
  masks = torch::stable::contiguous(masks);
  check_tensor(masks.dim() == 3 && masks.scalar_type() == ScalarType::Bool && masks.size(1) > 0 && masks.size(2) > 0,
               masks, "masks", "(R, H, W) bool with at least one pixel");
  const int64_t count = masks.size(0), h = masks.size(1), w = masks.size(2);
  STD_TORCH_CHECK(std::max(h, w) < INT32_MAX, "masks must have sides of less than 2^31");
  const std::vector<int64_t> rows = nearest_taps(h, checked(size, "size")[0]), columns = nearest_taps(w, size[1]);
  Tensor result = empty_result(masks, {count, size[0], size[1]}, ScalarType::Bool);
  const uint8_t* data = data_of<const uint8_t>(masks);
  uint8_t* out = data_of<uint8_t>(result);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t y = 0; y < size[0]; ++y) {
        const uint8_t* from = data + (r * h + rows[y]) * w;
        uint8_t* to = out + (r * size[0] + y) * size[1];
        if (y > 0 && rows[y] == rows[y - 1]) {
          memcpy(to, to - size[1], size[1]);
        } else if (memchr(from, 1, w) == nullptr) {
          memset(to, 0, size[1]);
        } else {
          for (int64_t x = 0; x < size[1]; ++x) to[x] = from[columns[x]];
        }
      }
    }
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> rle_encode(Tensor masks, int64_t width, OptionalSizes size) {
  masks = torch::stable::contiguous(masks);
  const bool packed = masks.scalar_type() == ScalarType::Byte;
  check_tensor(masks.dim() == 3 && (packed || masks.scalar_type() == ScalarType::Bool), masks, "masks",
               "(R, H, W) bool or (R, H, ceil(W / 8)) uint8");
  const int64_t count = masks.size(0), height = masks.size(1), row_bytes = masks.size(2);
  STD_TORCH_CHECK(width >= 1 && height >= 1 && width <= INT32_MAX && height <= INT32_MAX,
                  "masks must have sides of 1 to 2^31 - 1, got ", height, " x ", width);
  STD_TORCH_CHECK(row_bytes == (packed ? ceil_div(width, 8) : width), "masks has rows of ", row_bytes,
                  " bytes, which does not fit the width ", width);
  const Sizes out = size.has_value() ? checked(*size, "size") : Sizes{height, width};
  const uint8_t* data = data_of<const uint8_t>(masks);
  std::vector<std::string> encoded(count);
  Tensor areas = empty_result(masks, {count}, ScalarType::Long);
  int64_t* area = data_of<int64_t>(areas);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    RunLengthEncoder encoder(height, width, out[0], out[1]);
    for (int64_t r = begin; r < end; ++r) {
      area[r] = encoder.encode({data + r * height * row_bytes, height, width, row_bytes, packed}, encoded[r]);
    }
  });
  Tensor offsets = empty_result(masks, {count + 1}, ScalarType::Long);
  int64_t* offset = data_of<int64_t>(offsets);
  offset[0] = 0;
  for (int64_t r = 0; r < count; ++r) offset[r + 1] = offset[r] + static_cast<int64_t>(encoded[r].size());
  Tensor counts = empty_result(masks, {offset[count]}, ScalarType::Byte);
  char* characters = data_of<char>(counts);
  for (int64_t r = 0; r < count; ++r) memcpy(characters + offset[r], encoded[r].data(), encoded[r].size());
  return {counts, offsets, areas};
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("instance_masks", TORCH_BOX(&fastmask::instance_masks));
  library.impl("resize_masks", TORCH_BOX(&fastmask::resize_masks));
  library.impl("rle_encode", TORCH_BOX(&fastmask::rle_encode));
}
