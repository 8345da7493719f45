// The Python module fastmask._native: what is no PyTorch operator.
#include <pybind11/pybind11.h>

#include <string>

#include "simd.h"

namespace py = pybind11;

namespace {

std::string simd_level() { return fastmask::simd_level_name(fastmask::simd_level()); }

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Build information of fastmask's extension, and entry points that need no PyTorch.";
  module.attr("simd_levels") = FASTMASK_SIMD_LEVELS;
  module.attr("cuda_archs") = FASTMASK_CUDA_ARCHS;
  module.attr("compiler") = __VERSION__;
  module.def("simd_level", &simd_level, "The SIMD level that this processor has.");
}
