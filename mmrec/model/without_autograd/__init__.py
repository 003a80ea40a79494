"""A model forwards and backwards without autograd: steps that read and write buffers which were made once.

At the size of a laptop's models making tensors, the graph and the arguments of kernels costs as much as arithmetic.
Here all of that is done once. Products are torch's, and what is between them is computed by the kernels of
:mod:`mmrec.model.ops.native`, which the model's own ``forward`` takes, too. On a CPU. What stands for all tokens of a
batch has the shape [P, ...], where P = B T; the legend of shapes is that of :mod:`mmrec.model`.
"""
