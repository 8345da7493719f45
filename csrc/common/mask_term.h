// The per-pixel term of the mask cost and the mask loss.
#pragma once

namespace fastmask {

struct MaskTerm {
  bool focal;   // false: plain binary cross-entropy
  float alpha;  // the weight of foreground in the focal loss
  float gamma;
};

}  // namespace fastmask
