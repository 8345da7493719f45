#include "cpu/mask_loss.h"

#include "cpu/held_rows.h"
#include "cpu/mask_loss_sums.h"
#include "cpu/mask_terms.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// The code of an output pixel: bit 0 is set if it belongs to the target, bit 1 if it counts.
constexpr uint8_t kTarget = 1;
constexpr uint8_t kCounted = 2;

template <typename T>
void segment_codes(const T* row, int64_t width, int64_t target, int64_t void_value, bool ignore_void, uint8_t* codes) {
  // A target beyond the type's range owns no pixel; a void value beyond it marks none.
  const bool has_target = static_cast<int64_t>(static_cast<T>(target)) == target;
  const bool has_void = ignore_void && static_cast<int64_t>(static_cast<T>(void_value)) == void_value;
  const T wanted = static_cast<T>(target);
  const T ignored = static_cast<T>(void_value);
  const uint8_t target_bit = has_target ? kTarget : 0;
  const uint8_t void_bit = has_void ? kCounted : 0;
  for (int64_t j = 0; j < width; ++j) {
    const uint8_t code = (row[j] == wanted ? target_bit : 0) | kCounted;
    codes[j] = code ^ (row[j] == ignored ? void_bit : 0);
  }
}

// The codes of one output row, up to a full vector; pixels beyond the row do not count.
void pixel_codes(const ImageTargets& targets, int64_t y, int64_t target, uint8_t* codes) {
  const int64_t width = targets.width;
  const int64_t begin = y * width;
  if (targets.segments != nullptr) {
    with_segments(targets, [&](const auto* segments) {
      segment_codes(segments + begin, width, target, targets.void_value, targets.ignore_void, codes);
    });
  } else {
    const uint8_t* mask = targets.masks + target * targets.height * width + begin;
    for (int64_t j = 0; j < width; ++j) codes[j] = static_cast<uint8_t>((mask[j] != 0 ? kTarget : 0) | kCounted);
    if (targets.ignore_void && targets.valid != nullptr) {
      const uint8_t* valid = targets.valid + begin;
      for (int64_t j = 0; j < width; ++j) codes[j] = valid[j] != 0 ? codes[j] : 0;
    }
  }
  for (int64_t j = width; j % kMostLanes != 0; ++j) codes[j] = 0;
}

// Two neighboring rows of the prediction, stretched to W pixels. As y only increases, each row is stretched once.
class StretchedRows {
 public:
  StretchedRows(const Plane& plane, const Taps& columns, const MaskLossWorkspace& work)
      : plane_(plane), columns_(columns), source_(work.source), rows_(work.stretched) {}

  const float* row(int64_t index) {
    return rows_.row(index, [&](int64_t, float* out) {
      load_logits(row_of(plane_, index), plane_.w, source_);
      const int32_t *first = columns_.index, *second = first + columns_.stride;
      const float *first_weight = columns_.weight, *second_weight = first_weight + columns_.stride;
      for (int64_t j = 0; j < columns_.out; ++j) {
        out[j] = source_[first[j]] * first_weight[j] + source_[second[j]] * second_weight[j];
      }
      for (int64_t j = columns_.out; j % kMostLanes != 0; ++j) out[j] = 0.0f;
    });
  }

 private:
  const Plane& plane_;
  const Taps& columns_;
  float* source_;
  HeldRows rows_;
};

// The position of row y of the output between two stretched rows.
struct RowTaps {
  int32_t upper, lower;
  vfloat upper_weight, lower_weight;

  RowTaps(const Taps& rows, int64_t y)
      : upper(rows.index[y]),
        lower(rows.index[rows.stride + y]),
        upper_weight(splat(rows.weight[y])),
        lower_weight(splat(rows.weight[rows.stride + y])) {}
};

// With z = x inside the target and -x outside, the same formulas hold for both kinds of pixel:
// p_t = sigmoid(z), q = 1 - p_t, cross-entropy softplus(-z), focal a q^gamma softplus(-z).
struct Pixel {
  vint target;    // all ones where the pixel belongs to the target
  vint counted;   // all ones where it counts
  vfloat p_t, q;  // sigmoid(z), sigmoid(-z)
  vfloat cross_entropy;
  vfloat modulation;  // a q^gamma, or 1
};

template <bool kFocal, bool kSquare>
inline Pixel matched_pixel(const uint8_t* codes, vfloat x, MaskTerm term) {
  const vint code = load_bytes(codes);
  Pixel pixel;
  pixel.target = (code & splat(int32_t{kTarget})) != 0;
  pixel.counted = (code & splat(int32_t{kCounted})) != 0;
  const Sigmoid s = sigmoid(pixel.target ? x : -x);
  pixel.p_t = s.p;
  pixel.q = s.q;
  pixel.cross_entropy = s.softplus_neg;
  if (kFocal) {
    pixel.modulation = focal_power<kSquare>(s.q, s.softplus_pos, term.gamma);
    pixel.modulation *= pixel.target ? splat(term.alpha) : splat(1.0f - term.alpha);
  }
  return pixel;
}

template <bool kFocal, bool kSquare>
MaskLossPair forward(const Plane& plane, const Resampling& resampling, const ImageTargets& targets, int64_t target,
                     MaskTerm term, const MaskLossWorkspace& work) {
  StretchedRows stretched(plane, resampling.columns, work);
  uint8_t* const codes = work.codes;
  const int64_t width = targets.width;
  double loss = 0, intersection = 0, prediction = 0;
  int64_t target_pixels = 0, counted_pixels = 0;
  for (int64_t y = 0; y < targets.height; ++y) {
    const RowTaps taps(resampling.rows, y);
    const float* upper = stretched.row(taps.upper);
    const float* lower = stretched.row(taps.lower);
    pixel_codes(targets, y, target, codes);
    vfloat row_loss = {}, row_intersection = {}, row_prediction = {};
    vint row_target = {}, row_counted = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat x = fma(load(lower + j), taps.lower_weight, load(upper + j) * taps.upper_weight);
      const Pixel pixel = matched_pixel<kFocal, kSquare>(codes + j, x, term);
      const vint counted_target = pixel.target & pixel.counted;
      const vfloat pixel_loss = kFocal ? pixel.modulation * pixel.cross_entropy : pixel.cross_entropy;
      row_loss += masked(pixel.counted, pixel_loss);
      row_intersection += masked(counted_target, pixel.p_t);
      row_prediction += masked(pixel.counted, pixel.target ? pixel.p_t : pixel.q);
      row_target -= counted_target;
      row_counted -= pixel.counted;
    }
    loss += sum_lanes(row_loss);
    intersection += sum_lanes(row_intersection);
    prediction += sum_lanes(row_prediction);
    target_pixels += sum_lanes<int64_t>(row_target);
    counted_pixels += sum_lanes<int64_t>(row_counted);
  }
  return losses_of(loss, intersection, prediction, static_cast<double>(target_pixels),
                   static_cast<double>(counted_pixels));
}

// The gradients of two neighboring stretched rows, added to the result once no later y reaches them: the transpose of
// the horizontal stretch adds W gradients to the w logits from which the row was stretched.
class StretchedGradients {
 public:
  StretchedGradients(int64_t w, const Taps& columns, const MaskLossWorkspace& work, float* grad)
      : w_(w), columns_(columns), grad_(grad), rows_(work.gradients) {}

  float* row(int64_t index) {
    return rows_.row(index, [&](int64_t old, float* row) {
      contract(old, row);
      memset(row, 0, sizeof(float) * to_full_vectors(columns_.out));
    });
  }

  void flush() {
    rows_.each([&](int64_t index, const float* row) { contract(index, row); });
  }

 private:
  void contract(int64_t index, const float* stretched) {
    if (index < 0) return;
    float* grad_row = grad_ + index * w_;
    const int32_t *first = columns_.index, *second = first + columns_.stride;
    const float *first_weight = columns_.weight, *second_weight = first_weight + columns_.stride;
    for (int64_t j = 0; j < columns_.out; ++j) {
      grad_row[first[j]] += first_weight[j] * stretched[j];
      grad_row[second[j]] += second_weight[j] * stretched[j];
    }
  }

  int64_t w_;
  const Taps& columns_;
  float* grad_;
  HeldRows rows_;
};

// With U = sum p + sum t + 1 and I = 2 sum p t + 1, on the counted pixels:
//   d focal / dz = -a q^gamma (gamma p_t softplus(-z) + q) / pixels,   d cross-entropy / dz = -q / pixels,
//   d dice / dp = (I - 2 t U) / U^2,   dp / dx = p_t q,   dx = dz inside the target and -dz outside.
template <bool kFocal, bool kSquare>
void backward(const Plane& plane, const Resampling& resampling, const ImageTargets& targets, int64_t target,
              MaskTerm term, const MaskLossGradient& given, const MaskLossWorkspace& work, float* grad) {
  StretchedGradients gradients(plane.w, resampling.columns, work, grad);
  StretchedRows stretched(plane, resampling.columns, work);
  uint8_t* const codes = work.codes;
  const int64_t width = targets.width;
  const DiceSums sums(given.sums);
  const double both_squared = sums.both * sums.both;
  const vfloat scale = splat(static_cast<float>(-given.mask / (given.sums.pixels > 0 ? given.sums.pixels : 1.0)));
  const vfloat dice_outside = splat(static_cast<float>(given.dice * sums.twice_overlap / both_squared));
  const vfloat dice_inside =
      splat(static_cast<float>(given.dice * (sums.twice_overlap - 2.0 * sums.both) / both_squared));
  for (int64_t y = 0; y < targets.height; ++y) {
    const RowTaps taps(resampling.rows, y);
    const float* upper = stretched.row(taps.upper);
    const float* lower = stretched.row(taps.lower);
    float* grad_upper = gradients.row(taps.upper);
    float* grad_lower = gradients.row(taps.lower);
    pixel_codes(targets, y, target, codes);
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat x = fma(load(lower + j), taps.lower_weight, load(upper + j) * taps.upper_weight);
      const Pixel pixel = matched_pixel<kFocal, kSquare>(codes + j, x, term);
      vfloat slope = pixel.q;
      if (kFocal) slope = pixel.modulation * fma(term.gamma * pixel.p_t, pixel.cross_entropy, pixel.q);
      slope *= scale;
      slope = pixel.target ? slope : -slope;
      const vfloat dice_slope = pixel.target ? dice_inside : dice_outside;
      const vfloat g = masked(pixel.counted, fma(dice_slope * pixel.p_t, pixel.q, slope));
      store(grad_upper + j, fma(g, taps.upper_weight, load(grad_upper + j)));
      store(grad_lower + j, fma(g, taps.lower_weight, load(grad_lower + j)));
    }
  }
  gradients.flush();
}

}  // namespace

MaskLossPair mask_loss_pair(const Plane& plane, const Resampling& resampling, const ImageTargets& targets,
                            int64_t target, MaskTerm term, const MaskLossWorkspace& work) {
  return with_term(term, [&]<bool kFocal, bool kSquare>() {
    return forward<kFocal, kSquare>(plane, resampling, targets, target, term, work);
  });
}

void mask_loss_pair_backward(const Plane& plane, const Resampling& resampling, const ImageTargets& targets,
                             int64_t target, MaskTerm term, const MaskLossGradient& given,
                             const MaskLossWorkspace& work, float* grad) {
  with_term(term, [&]<bool kFocal, bool kSquare>() {
    backward<kFocal, kSquare>(plane, resampling, targets, target, term, given, work, grad);
  });
}

void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset) {
  store_logits(in, count, out, dtype, offset);
}

}  // namespace fastmask::FASTMASK_SIMD
