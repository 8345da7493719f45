// Registers kernels of the operators, in the namespace that the build names: one for each build, or `fastmask`.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME fastmask
#endif

// STABLE_TORCH_LIBRARY_IMPL does not expand the name that it is given.
#define FASTMASK_EXPANDED_LIBRARY_IMPL(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
#define FASTMASK_LIBRARY_IMPL(key, library) FASTMASK_EXPANDED_LIBRARY_IMPL(TORCH_EXTENSION_NAME, key, library)
