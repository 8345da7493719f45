"""Triton kernels, installed as ``fastmask.kernels``; imported on first use, so that fastmask works without Triton."""
