// A pixel's or point's terms in the mask cost and the mask losses.
#pragma once

#include "common/mask_term.h"
#include "cpu/simd/functions.h"

namespace fastmask::FASTMASK_SIMD {

// base^gamma, the weight of the focal loss, for base in [0, 1], given -log(base) >= 0; bounded, so that 0^0 is 1.
template <bool kSquare>
static inline vfloat focal_power(vfloat base, vfloat minus_log, float gamma) {
  return kSquare ? base * base : exp_neg(at_most(minus_log, 1e30f) * gamma);
}

// The loss of a logit as foreground and as background: F+ and F-, or softplus(-x) and softplus(x).
struct PixelTerms {
  vfloat p, q;                                // sigmoid(x), sigmoid(-x)
  vfloat foreground, background;              // F+, F-
  vfloat foreground_slope, background_slope;  // -dF+/dx, dF-/dx, if requested
};

template <bool kFocal, bool kSquare, bool kSlopes = false>
static inline PixelTerms pixel_terms(vfloat x, MaskTerm term) {
  const Sigmoid s = sigmoid(x);
  if (!kFocal) return {s.p, s.q, s.softplus_neg, s.softplus_pos, s.q, s.p};
  const vfloat positive = term.alpha * focal_power<kSquare>(s.q, s.softplus_pos, term.gamma);
  const vfloat negative = (1.0f - term.alpha) * focal_power<kSquare>(s.p, s.softplus_neg, term.gamma);
  PixelTerms terms{s.p, s.q, s.softplus_neg * positive, s.softplus_pos * negative, {}, {}};
  if (kSlopes) {
    terms.foreground_slope = positive * fma(term.gamma * s.p, s.softplus_neg, s.q);
    terms.background_slope = negative * fma(term.gamma * s.q, s.softplus_pos, s.p);
  }
  return terms;
}

// Calls run.operator()<kFocal, kSquare>(): cross-entropy, the focal loss with gamma 2, or with another gamma.
template <class Run>
static inline auto with_term(MaskTerm term, const Run& run) {
  if (!term.focal) return run.template operator()<false, true>();
  return term.gamma == 2.0f ? run.template operator()<true, true>() : run.template operator()<true, false>();
}

}  // namespace fastmask::FASTMASK_SIMD
