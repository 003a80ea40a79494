"""Kernels in C for a CPU: the memories with all that surrounds them, the norm, and SwiGLU, each in one pass.

``build`` compiles them where there is a compiler; ``functions`` gives them gradients.
"""
