"""Kernels without a GPU: run by Triton's interpreter, and compiled ahead of time; see test_kernels."""
