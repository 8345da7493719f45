#include "cpu/semantic.h"
#include "cpu/semantic_strip.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Writes x clamped to +-kLogitBound, with NaN as the lower bound; returns how many lanes are NaN.
inline int32_t store_bounded(vfloat x, float* out) {
  store(out, minimum(maximum(x, splat(-kLogitBound)), splat(kLogitBound)));
  return __builtin_popcount(lane_bits(x != x));
}

// Reads a row, padded with 0 to a full vector, and returns how many of its logits are NaN.
int32_t load_bounded(Logits row, int64_t count, float* out) {
  int32_t nans = 0;
  int64_t i = 0;
  if (row.dtype == Dtype::kFloat32) {
    const float* logits = static_cast<const float*>(row.data) + row.offset;
    for (; i + kLanes <= count; i += kLanes) nans += store_bounded(load(logits + i), out + i);
    if (i < count) nans += store_bounded(load_some(logits + i, count - i), out + i);
    return nans;
  }
  load_logits(row, count, out);
  for (; i < count; i += kLanes) nans += store_bounded(load(out + i), out + i);
  return nans;
}

inline void copy(const float* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  if (i < count) store_some(out + i, load(in + i), count - i);
}

// Writes the largest of `count` values in each of kPackQueries rows to out[kPackQueries]; values after them must not be
// larger.
inline void largest_of_rows(const float* rows, int64_t stride, int64_t count, float* lanes, float* out) {
  const int64_t last = count < kLanes ? 0 : count - kLanes;
  for (int64_t q = 0; q < kPackQueries; ++q) {
    const float* x = rows + q * stride;
    vfloat most = load(x + last);
    for (int64_t j = 0; j < last; j += kLanes) most = maximum(most, load(x + j));
    store(lanes + q * (kLanes + 1), most);
  }
  for (int64_t q = 0; q < kPackQueries; q += kLanes) {
    const vint at = by_lane([q](int i) { return static_cast<int32_t>((q + i) * (kLanes + 1)); });
    vfloat most = gather(lanes, at);
    for (int i = 1; i < kLanes; ++i) most = maximum(most, gather(lanes + i, at));
    store(out + q, most);
  }
}

}  // namespace

void pack_logits(const MaskPlanes& planes, const Taps& columns, int64_t begin, int64_t end, int64_t count_end,
                 const PackedLogits& packed, int32_t* nans, const PackWorkspace& work) {
  const int64_t w = planes.first.w, width = to_full_vectors(w) + 32;
  for (int64_t i = 0; i < kPackQueries * width; ++i) work.rows[i] = -kLogitBound;
  for (int64_t row = begin; row < end; ++row) {
    const bool wanted = row >= packed.top && row < packed.top + packed.rows;
    for (int64_t first = 0; first < planes.queries; first += kPackQueries) {
      const int64_t left = planes.queries - first, count = left < kPackQueries ? left : kPackQueries;
      for (int64_t q = 0; q < count; ++q) {
        const Logits logits = after(row_of(planes.first, row), (first + q) * planes.query_stride);
        const int32_t found = load_bounded(logits, w, work.rows + q * width);
        if (row < count_end) nans[first + q] += found;
      }
      for (int64_t strip = 0; wanted && strip < packed.strips; ++strip) {
        const StripSpan span = strip_span(columns, strip);
        const int64_t at = (strip * packed.rows + row - packed.top) * planes.queries + first;
        for (int64_t q = 0; q < count; ++q) {
          copy(work.rows + q * width + span.left, span.count, packed.logits + (at + q) * packed.stride);
        }
        if (packed.cells == nullptr) continue;
        float* cells = packed.cells + ((row - packed.top) * packed.strips + strip) * to_full_vectors(planes.queries);
        largest_of_rows(work.rows + span.left, width, span.count, work.lanes, cells + first);
      }
    }
  }
}

}  // namespace fastmask::FASTMASK_SIMD
