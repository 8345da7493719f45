#include "cpu/point_mask_loss.h"

#include "cpu/mask_loss_sums.h"
#include "cpu/mask_terms.h"
#include "cpu/simd/gather.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int64_t kBlock = 128;  // points whose x and y are separated, and whose terms are summed in float

// The x and y coordinates of some points, in separate arrays; entries beyond the last point are off the map.
struct Coordinates {
  float x[kBlock], y[kBlock];

  Coordinates(const float* points, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      x[i] = points[2 * i];
      y[i] = points[2 * i + 1];
    }
    for (int64_t i = count; i < kBlock && i % kMostLanes != 0; ++i) x[i] = y[i] = -1.0f;
  }
};

// Gathers pixels of an H x W map as words of four bytes that begin at a pixel, or at the last possible byte.
template <typename T>
struct Pixels {
  const uint8_t* data;
  int32_t last_word;  // the last pixel from which four bytes can be read
  uint8_t few[4];     // a copy of a map with fewer bytes

  Pixels(const void* map, int64_t count) : data(static_cast<const uint8_t*>(map)), few{} {
    const int64_t whole = 4 / static_cast<int64_t>(sizeof(T));
    last_word = static_cast<int32_t>(count > whole ? count - whole : 0);
    if (count < whole) {
      memcpy(few, map, count * sizeof(T));
      data = few;
    }
  }
  Pixels(const Pixels&) = delete;

  // Pixels `at` and at + 1 of a row; beyond the map's end, the second is arbitrary.
  void pair(vint at, vint& first, vint& second) const {
    const vint from = at < last_word ? at : splat(last_word);
    if constexpr (sizeof(T) == 4) {
      first = gather_words(data, from * 4);
      second = gather_words(data, (from < last_word ? from + 1 : from) * 4);
    } else {
      constexpr int kBits = 8 * sizeof(T);
      constexpr int32_t kMask = (1 << kBits) - 1;
      const vint late = at - from;
      const vint word = gather_words(data, from * static_cast<int32_t>(sizeof(T)));
      first = (word >> (late * kBits)) & kMask;
      const vint next = late + 1;
      second = (word >> ((next < 4 / static_cast<int>(sizeof(T)) ? next : late) * kBits)) & kMask;
    }
  }
};

// The pixels of the targets around points: four positions, and the bilinear weight of each, 0 beyond the map.
struct PixelTaps {
  vint upper, lower;  // the left pixel of each pair
  vfloat weights[4];  // upper left, upper right, lower left, lower right
};

// The first of two neighboring pixels of the map around each position, and the weights of both.
inline vint pixel_axis(vfloat coordinates, int64_t size, vfloat (&weight)[2]) {
  const Positions at = positions(coordinates, size);  // counts the border: 0 is the pixel before the map
  const int32_t last = static_cast<int32_t>(size > 1 ? size - 2 : 0);
  vint first = at.first - 1;
  // A pair before the map is shifted by one, so that its second pixel is read as the first; after the map, vice versa.
  const vint before = first < 0;
  const vint after = first > last;
  first = before ? vint{} : first;
  first = after ? splat(last) : first;
  const vfloat opposite = 1.0f - at.weight;
  weight[0] = before ? at.weight : opposite;
  weight[0] = after ? vfloat{} : weight[0];
  weight[1] = before ? vfloat{} : at.weight;
  weight[1] = after ? opposite : weight[1];
  if (size == 1) weight[1] = vfloat{};
  return first;
}

inline PixelTaps pixel_taps(vfloat x, vfloat y, const ImageTargets& targets) {
  vfloat columns[2], rows[2];
  const int32_t width = static_cast<int32_t>(targets.width);
  const vint column = pixel_axis(x, targets.width, columns);
  const vint row = pixel_axis(y, targets.height, rows);
  PixelTaps taps;
  taps.upper = row * width + column;
  taps.lower = targets.height > 1 ? taps.upper + width : taps.upper;
  for (int i = 0; i < 4; ++i) taps.weights[i] = rows[i / 2] * columns[i % 2];
  return taps;
}

struct Shares {
  vfloat target;  // t, the share of the target's pixels
  vfloat weight;  // v, 1 - the share of void pixels
};

// Looks up points in targets of type T: segments, or one mask and the valid pixels.
template <typename T>
class Reader {
 public:
  Reader(const ImageTargets& targets, int64_t target)
      : targets_(targets),
        segments_(targets.segments != nullptr),
        has_void_(targets.ignore_void && (segments_ ? fits(targets.void_value) : targets.valid != nullptr)),
        plane_(segments_ ? targets.segments : targets.masks + target * targets.height * targets.width,
               targets.height * targets.width),
        valid_(targets.valid != nullptr ? targets.valid : plane_.data, targets.valid != nullptr ? size() : 1),
        target_(code(target)),
        void_(code(targets.void_value)) {}

  Shares at(vfloat x, vfloat y) const {
    const PixelTaps taps = pixel_taps(x, y, targets_);
    vint pixels[4], is_void[4];
    plane_.pair(taps.upper, pixels[0], pixels[1]);
    plane_.pair(taps.lower, pixels[2], pixels[3]);
    if (has_void_ && !segments_) {
      valid_.pair(taps.upper, is_void[0], is_void[1]);
      valid_.pair(taps.lower, is_void[2], is_void[3]);
    }
    Shares shares{{}, splat(1.0f)};
    vfloat void_share = {};
    for (int i = 0; i < 4; ++i) {
      vint belongs = segments_ ? pixels[i] == target_ : pixels[i] != 0;
      if (has_void_) {
        is_void[i] = segments_ ? pixels[i] == void_ : is_void[i] == 0;
        belongs &= ~is_void[i];
        void_share += masked(is_void[i], taps.weights[i]);
      }
      shares.target += masked(belongs, taps.weights[i]);
    }
    if (has_void_) {
      shares.weight = 1.0f - void_share;
      const vint counts = shares.weight >= kLeastWeight;
      shares.weight = masked(counts, shares.weight);
      shares.target = masked(counts, shares.target);
    }
    return shares;
  }

 private:
  int64_t size() const { return targets_.height * targets_.width; }

  static bool fits(int64_t value) { return static_cast<int64_t>(static_cast<T>(value)) == value; }

  // The bits of a value in a pixel of type T; a value beyond the type's range gets bits that no pixel has.
  static int32_t code(int64_t value) {
    if constexpr (sizeof(T) == 4) return static_cast<int32_t>(value);
    return fits(value) ? static_cast<int32_t>(value) & ((1 << (8 * sizeof(T) % 32)) - 1) : -1;
  }

  const ImageTargets& targets_;
  bool segments_, has_void_;
  Pixels<T> plane_;
  Pixels<uint8_t> valid_;
  int32_t target_, void_;
};

// The loss is t F+ + (v - t) F-.
template <bool kFocal, bool kSquare, bool kSlopes>
inline PixelTerms point_terms(vfloat x, const Shares& shares, MaskTerm term) {
  return pixel_terms<kFocal, kSquare, kSlopes>(masked(shares.weight > 0.0f, x), term);  // x may be NaN at weight 0
}

using Quad = float __attribute__((vector_size(16)));

// The slopes of some points, and where their four logits are.
struct PointSlopes {
  int32_t cells[kBlock];  // of the upper left logit
  float weights[4][kBlock];
  float slopes[kMaskLossSlopes][kBlock];

  // Adds them to the four logits of each point, one point after the other.
  void scatter(int64_t count, int32_t stride, float* map) const {
    const int32_t corners[4] = {0, 1, stride, stride + 1};
    for (int64_t i = 0; i < count; ++i) {
      const Quad slope{slopes[0][i], slopes[1][i], slopes[2][i], 0.0f};
      for (int k = 0; k < 4; ++k) {
        float* const cell = map + 4 * static_cast<int64_t>(cells[i] + corners[k]);
        Quad sum;
        memcpy(&sum, cell, sizeof sum);
        sum += slope * weights[k][i];
        memcpy(cell, &sum, sizeof sum);
      }
    }
  }
};

// With U = sum v p + sum t + 1 and I = 2 sum p t + 1:
//   d mask / dx = (t dF+/dx + (v - t) dF-/dx) / sum v,   d dice / dx = (I v - 2 t U) / U^2 p (1 - p).
template <bool kFocal, bool kSquare, bool kSlopes, typename T>
MaskLossPair losses(const Plane& plane, const ImageTargets& targets, int64_t target, const float* points,
                    int64_t num_points, MaskTerm term, const PointMaskLossWorkspace& work, float* pair_slopes) {
  const Reader<T> reader(targets, target);
  const int32_t stride = static_cast<int32_t>(plane.w) + 2;
  if (kSlopes) memset(work.slopes, 0, 4 * sizeof(float) * bordered_size(plane.h, plane.w));
  double loss = 0, intersection = 0, prediction = 0, of_target = 0, weight = 0;
  for (int64_t begin = 0; begin < num_points; begin += kBlock) {
    const int64_t count = num_points - begin < kBlock ? num_points - begin : kBlock;
    const Coordinates at(points + 2 * begin, count);
    [[maybe_unused]] PointSlopes slopes;
    vfloat losses = {}, intersections = {}, predictions = {}, targets_sum = {}, weights = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const vfloat x = load(at.x + i), y = load(at.y + i);
      const Positions columns = positions(x, plane.w), rows = positions(y, plane.h);
      const vfloat logit = sample(work.map, stride, columns, rows);
      Shares shares = reader.at(x, y);
      if (i + kLanes > count) {
        for (int64_t k = count - i; k < kLanes; ++k) shares.target[k] = shares.weight[k] = 0.0f;
      }
      const vfloat t = shares.target, v = shares.weight;
      const PixelTerms terms = point_terms<kFocal, kSquare, kSlopes>(logit, shares, term);
      losses += fma(t, terms.foreground, (v - t) * terms.background);
      intersections += terms.p * t;
      predictions += terms.p * v;
      targets_sum += t;
      weights += v;
      if (kSlopes) {
        const vfloat steepness = terms.p * terms.q;
        const vfloat slope[kMaskLossSlopes] = {(v - t) * terms.background_slope - t * terms.foreground_slope,
                                               t * steepness, (v - t) * steepness};
        for (int k = 0; k < kMaskLossSlopes; ++k) store(slopes.slopes[k] + i, masked(v > 0.0f, slope[k]));
        const vfloat upper = 1.0f - rows.weight, left = 1.0f - columns.weight;
        store(slopes.weights[0] + i, upper * left);
        store(slopes.weights[1] + i, upper * columns.weight);
        store(slopes.weights[2] + i, rows.weight * left);
        store(slopes.weights[3] + i, rows.weight * columns.weight);
        store(slopes.cells + i, rows.first * stride + columns.first);
      }
    }
    if (kSlopes) slopes.scatter(count, stride, work.slopes);
    loss += sum_lanes(losses);
    intersection += sum_lanes(intersections);
    prediction += sum_lanes(predictions);
    of_target += sum_lanes(targets_sum);
    weight += sum_lanes(weights);
  }
  const MaskLossPair pair = losses_of(loss, intersection, prediction, of_target, weight);
  if (!kSlopes) return pair;
  const DiceSlopes dice = dice_slopes(pair.sums);
  const float mask = 1.0f / (pair.sums.pixels > 1.0f ? pair.sums.pixels : 1.0f);
  for (int64_t y = 0; y < plane.h; ++y) {
    const float* row = work.slopes + 4 * ((y + 1) * stride + 1);
    for (int64_t column = 0; column < plane.w; ++column, row += 4) {
      pair_slopes[y * plane.w + column] = mask * row[0];
      pair_slopes[(plane.h + y) * plane.w + column] = dice.inside * row[1] + dice.outside * row[2];
    }
  }
  return pair;
}

// Calls run.operator()<kFocal, kSquare, T>() for the kind of loss and the type of the targets.
template <typename Run>
auto dispatch(MaskTerm term, const ImageTargets& targets, const Run& run) {
  return with_term(term, [&]<bool kFocal, bool kSquare>() {
    if (targets.segments == nullptr) return run.template operator()<kFocal, kSquare, uint8_t>();
    return with_segments(targets, [&]<typename T>(const T*) { return run.template operator()<kFocal, kSquare, T>(); });
  });
}

}  // namespace

MaskLossPair point_mask_loss_pair(const Plane& plane, const ImageTargets& targets, int64_t target, const float* points,
                                  int64_t num_points, MaskTerm term, const PointMaskLossWorkspace& work,
                                  float* slopes) {
  load_bordered(plane, work.map);
  return dispatch(term, targets, [&]<bool kFocal, bool kSquare, typename T>() {
    const auto run = slopes == nullptr ? losses<kFocal, kSquare, false, T> : losses<kFocal, kSquare, true, T>;
    return run(plane, targets, target, points, num_points, term, work, slopes);
  });
}

}  // namespace fastmask::FASTMASK_SIMD
