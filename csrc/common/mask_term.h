// The per-pixel term of the mask cost and the mask loss.
#pragma once

namespace fastmask {

struct MaskTerm {
  bool focal;   // false: plain binary cross-entropy
  float alpha;  // of the focal loss: the weight of foreground
  float gamma;
};

}  // namespace fastmask
