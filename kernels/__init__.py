"""Triton kernels, installed as ``fastmask.kernels``; imported when first used, so that fastmask works without them."""
