#include "cpu/mask_loss.h"

#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// What is known of a pixel of the output: bit 0, it belongs to the target; bit 1, it counts.
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

// Codes of one output row, up to a full vector: pixels beyond the row do not count.
void pixel_codes(const ImageTargets& targets, int64_t y, int64_t target, uint8_t* codes) {
  const int64_t width = targets.width;
  const int64_t begin = y * width;
  if (targets.segments != nullptr) {
    switch (targets.segment_type) {
      case SegmentType::kUInt8:
        segment_codes(static_cast<const uint8_t*>(targets.segments) + begin, width, target, targets.void_value,
                      targets.ignore_void, codes);
        break;
      case SegmentType::kInt16:
        segment_codes(static_cast<const int16_t*>(targets.segments) + begin, width, target, targets.void_value,
                      targets.ignore_void, codes);
        break;
      default:
        segment_codes(static_cast<const int32_t*>(targets.segments) + begin, width, target, targets.void_value,
                      targets.ignore_void, codes);
    }
  } else {
    const uint8_t* mask = targets.masks + target * targets.height * width + begin;
    for (int64_t j = 0; j < width; ++j) codes[j] = static_cast<uint8_t>((mask[j] != 0 ? kTarget : 0) | kCounted);
    if (targets.ignore_void && targets.valid != nullptr) {
      const uint8_t* valid = targets.valid + begin;
      for (int64_t j = 0; j < width; ++j) codes[j] = valid[j] != 0 ? codes[j] : 0;
    }
  }
  for (int64_t j = width; j % 16 != 0; ++j) codes[j] = 0;
}

// Two neighboring rows of the prediction, stretched to W pixels; rows advance with y, so each is stretched once.
class StretchedRows {
 public:
  StretchedRows(const void* logits, int64_t offset, Dtype dtype, const Resampling& resampling, int64_t width,
                float* scratch)
      : logits_(logits), offset_(offset), dtype_(dtype), resampling_(resampling), width_(width) {
    rows_[0] = scratch;
    rows_[1] = scratch + padded_row(width);
    source_ = scratch + 2 * padded_row(width);
  }

  // The stretched row `index`, which must be one of the last two asked for or a later one.
  const float* row(int64_t index) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == index) return rows_[slot];
    }
    const int slot = held_[0] <= held_[1] ? 0 : 1;
    held_[slot] = index;
    load_logits(logits_, dtype_, offset_ + index * resampling_.w, resampling_.w, source_);
    const Interpolation& columns = resampling_.columns;
    float* out = rows_[slot];
    for (int64_t j = 0; j < width_; ++j) {
      out[j] = source_[columns.first[j]] * (1.0f - columns.weight[j]) + source_[columns.second[j]] * columns.weight[j];
    }
    for (int64_t j = width_; j % 16 != 0; ++j) out[j] = 0.0f;
    return rows_[slot];
  }

 private:
  const void* logits_;
  int64_t offset_;
  Dtype dtype_;
  const Resampling& resampling_;
  int64_t width_;
  float* rows_[2];
  float* source_;
  int64_t held_[2] = {-2, -1};
};

// With z = x where the pixel belongs to the target and -x elsewhere, both kinds of pixel have the same formulas:
// p_t = sigmoid(z), q = 1 - p_t, cross-entropy softplus(-z), focal a q^gamma softplus(-z).
struct Pixel {
  vint target;    // all ones where the pixel belongs to the target
  vint counted;   // all ones where it counts
  vfloat p_t, q;  // sigmoid(z), sigmoid(-z)
  vfloat cross_entropy;
  vfloat modulation;  // a q^gamma, or 1
};

template <bool kFocal, bool kSquare>
inline Pixel pixel_terms(const uint8_t* codes, vfloat x, MaskTerm term) {
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
MaskLossPair forward(const void* mask_logits, int64_t offset, Dtype dtype, const Resampling& resampling,
                     const ImageTargets& targets, int64_t target, MaskTerm term, float* scratch) {
  const int64_t width = targets.width;
  StretchedRows stretched(mask_logits, offset, dtype, resampling, width, scratch);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + 2 * padded_row(width) + padded_row(resampling.w));
  double loss = 0, intersection = 0, prediction = 0;
  int64_t target_pixels = 0, counted_pixels = 0;
  for (int64_t y = 0; y < targets.height; ++y) {
    const float* upper = stretched.row(resampling.rows.first[y]);
    const float* lower = stretched.row(resampling.rows.second[y]);
    const vfloat weight = splat(resampling.rows.weight[y]);
    pixel_codes(targets, y, target, codes);
    vfloat row_loss = {}, row_intersection = {}, row_prediction = {};
    vint row_target = {}, row_counted = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat x = fma(load(lower + j), weight, load(upper + j) * (1.0f - weight));
      const Pixel pixel = pixel_terms<kFocal, kSquare>(codes + j, x, term);
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
    for (int i = 0; i < kLanes; ++i) {
      target_pixels += row_target[i];
      counted_pixels += row_counted[i];
    }
  }
  MaskLossPair pair;
  pair.mask = static_cast<float>(loss / static_cast<double>(counted_pixels > 0 ? counted_pixels : 1));
  pair.dice =
      static_cast<float>(1.0 - (2.0 * intersection + 1.0) / (prediction + static_cast<double>(target_pixels) + 1.0));
  pair.sums = {static_cast<float>(intersection), static_cast<float>(prediction), static_cast<float>(target_pixels),
               static_cast<float>(counted_pixels)};
  return pair;
}

// The transpose of the horizontal stretch: adds W gradients to the w logits that they were made of.
void add_contracted(const float* stretched, const Interpolation& columns, int64_t width, float* grad_row) {
  for (int64_t j = 0; j < width; ++j) {
    const float weight = columns.weight[j];
    grad_row[columns.first[j]] += (1.0f - weight) * stretched[j];
    grad_row[columns.second[j]] += weight * stretched[j];
  }
}

// The gradients of two neighboring stretched rows, contracted into the result once no later y reaches them.
class StretchedGradients {
 public:
  StretchedGradients(const Resampling& resampling, int64_t width, float* scratch, float* grad)
      : resampling_(resampling), width_(width), grad_(grad) {
    rows_[0] = scratch;
    rows_[1] = scratch + padded_row(width);
  }

  float* row(int64_t index) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == index) return rows_[slot];
    }
    const int slot = held_[0] <= held_[1] ? 0 : 1;
    flush(slot);
    held_[slot] = index;
    memset(rows_[slot], 0, sizeof(float) * padded_row(width_));
    return rows_[slot];
  }

  void flush() {
    flush(0);
    flush(1);
  }

 private:
  void flush(int slot) {
    if (held_[slot] >= 0) {
      add_contracted(rows_[slot], resampling_.columns, width_, grad_ + held_[slot] * resampling_.w);
    }
  }

  const Resampling& resampling_;
  int64_t width_;
  float* grad_;
  float* rows_[2];
  int64_t held_[2] = {-2, -1};
};

// With U = sum p + sum t + 1 and I = 2 sum p t + 1, on the counted pixels:
//   d focal / dz = -a q^gamma (gamma p_t softplus(-z) + q) / pixels,   d cross-entropy / dz = -q / pixels,
//   d dice / dp = (I - 2 t U) / U^2,   dp / dx = p_t q,   dx = dz inside the target and -dz outside.
template <bool kFocal, bool kSquare>
void backward(const void* mask_logits, int64_t offset, Dtype dtype, const Resampling& resampling,
              const ImageTargets& targets, int64_t target, MaskTerm term, const MaskLossSums& sums, float grad_mask,
              float grad_dice, float* scratch, float* grad) {
  const int64_t width = targets.width;
  StretchedGradients gradients(resampling, width, scratch, grad);
  float* forward_scratch = scratch + 2 * padded_row(width);
  StretchedRows stretched(mask_logits, offset, dtype, resampling, width, forward_scratch);
  uint8_t* codes = reinterpret_cast<uint8_t*>(forward_scratch + 2 * padded_row(width) + padded_row(resampling.w));

  const double pixels = sums.pixels > 0 ? sums.pixels : 1.0;
  const double both = static_cast<double>(sums.prediction) + sums.target + 1.0;
  const double twice_overlap = 2.0 * sums.intersection + 1.0;
  const vfloat scale = splat(static_cast<float>(-grad_mask / pixels));
  const vfloat dice_outside = splat(static_cast<float>(grad_dice * twice_overlap / (both * both)));
  const vfloat dice_inside = splat(static_cast<float>(grad_dice * (twice_overlap - 2.0 * both) / (both * both)));
  for (int64_t y = 0; y < targets.height; ++y) {
    const float* upper = stretched.row(resampling.rows.first[y]);
    const float* lower = stretched.row(resampling.rows.second[y]);
    float* grad_upper = gradients.row(resampling.rows.first[y]);
    float* grad_lower = gradients.row(resampling.rows.second[y]);
    const vfloat weight = splat(resampling.rows.weight[y]);
    pixel_codes(targets, y, target, codes);
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat x = fma(load(lower + j), weight, load(upper + j) * (1.0f - weight));
      const Pixel pixel = pixel_terms<kFocal, kSquare>(codes + j, x, term);
      vfloat slope = pixel.q;
      if (kFocal) slope = pixel.modulation * fma(term.gamma * pixel.p_t, pixel.cross_entropy, pixel.q);
      slope *= scale;
      slope = pixel.target ? slope : -slope;
      const vfloat dice_slope = pixel.target ? dice_inside : dice_outside;
      const vfloat g = masked(pixel.counted, fma(dice_slope * pixel.p_t, pixel.q, slope));
      store(grad_upper + j, fma(g, 1.0f - weight, load(grad_upper + j)));
      store(grad_lower + j, fma(g, weight, load(grad_lower + j)));
    }
  }
  gradients.flush();
}

}  // namespace

MaskLossPair mask_loss_pair(const void* mask_logits, int64_t offset, Dtype dtype, const Resampling& resampling,
                            const ImageTargets& targets, int64_t target, MaskTerm term, float* scratch) {
  const auto run = !term.focal ? forward<false, true> : term.gamma == 2.0f ? forward<true, true> : forward<true, false>;
  return run(mask_logits, offset, dtype, resampling, targets, target, term, scratch);
}

void mask_loss_pair_backward(const void* mask_logits, int64_t offset, Dtype dtype, const Resampling& resampling,
                             const ImageTargets& targets, int64_t target, MaskTerm term, const MaskLossSums& sums,
                             float grad_mask, float grad_dice, float* scratch, float* grad) {
  const auto run = !term.focal          ? backward<false, true>
                   : term.gamma == 2.0f ? backward<true, true>
                                        : backward<true, false>;
  run(mask_logits, offset, dtype, resampling, targets, target, term, sums, grad_mask, grad_dice, scratch, grad);
}

void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset) {
  store_logits(in, count, out, dtype, offset);
}

}  // namespace fastmask::FASTMASK_SIMD
