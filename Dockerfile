# mmrec on a CPU, the default, or on a GPU of NVIDIA:
#   docker build -t mmrec .
#   docker build -t mmrec:cuda --target cuda .
# The first is smaller where the address of PyTorch's own CPU builds is given: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
#   docker run --rm -v "$PWD:/work" mmrec train novel.txt
# Runs and data lie in the folder that is mounted at /work, which the user 1000 has to be allowed to write to. The images
# have not been built where this was written.

FROM python:3.13-slim AS wheel
RUN python -m pip install --no-cache-dir build==1.6.1
COPY . /source
RUN python -m build --wheel --outdir /wheels /source

FROM python:3.13-slim AS base
# The compiler makes the kernels for a CPU, when they are first needed.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN useradd --create-home --uid 1000 mmrec && mkdir /work && chown mmrec /work
WORKDIR /work
ENTRYPOINT ["mmrec"]
CMD ["--help"]

# torch of the package index, which brings CUDA; the driver is that of the host (NVIDIA Container Toolkit).
FROM base AS cuda
RUN python -m pip install --no-cache-dir --constraint /wheels/constraints.txt torch==2.13.0 /wheels/*.whl
USER 1000

# The last one is what is built where no target is named.
FROM base AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN python -m pip install --no-cache-dir --constraint /wheels/constraints.txt torch==2.13.0 /wheels/*.whl
USER 1000
