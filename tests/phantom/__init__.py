"""A simulated CUDA device in a CPU build of torch: what a program does wrong on a GPU shows, without a GPU.

Memory and arithmetic are the host's; everything around them is a device's: tensors of two devices do not mix, numpy
refuses a tensor of the device, autocast of "cuda" acts, checkpoints carry device locations, generators are the
device's. Kernels, waits of the host, and bytes are counted. Not simulated: speed, races between streams, the numerics
of CUDA kernels, cuDNN and NCCL, fused optimizers (their kernels are counted one by one).

Nothing takes it away again from a process that it was installed in: tests with the marker ``simulated_cuda`` run in
a process of their own (:mod:`phantom.plugin`), and so do commands with several devices (the fixture
``run_on_devices``).
"""
