# mmrec on a CPU, the default, or on a GPU of NVIDIA:
#   docker build -t mmrec .
#   docker build -t mmrec:cuda --target cuda .
# The first is smaller where the address of PyTorch's own CPU builds is given: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
#   docker run --rm -v "$PWD:/work" mmrec train novel.txt
# Runs and data lie in the folder that is mounted at /work. The images have not been built where this was written.

FROM python:3.13-slim AS wheel
RUN python -m pip install --no-cache-dir build==1.6.1
COPY . /source
RUN python -m build --wheel --outdir /wheels /source

FROM python:3.13-slim AS cpu
ARG PIP_EXTRA_INDEX_URL
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN python -m pip install --no-cache-dir --constraint /wheels/constraints.txt torch==2.13.0 /wheels/*.whl \
    && useradd --create-home mmrec \
    && mkdir /work && chown mmrec /work
USER mmrec
WORKDIR /work
ENTRYPOINT ["mmrec"]
CMD ["--help"]

# torch of the package index, which brings CUDA; the driver is that of the host (NVIDIA Container Toolkit).
FROM python:3.13-slim AS cuda
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN python -m pip install --no-cache-dir --constraint /wheels/constraints.txt torch==2.13.0 /wheels/*.whl \
    && useradd --create-home mmrec \
    && mkdir /work && chown mmrec /work
USER mmrec
WORKDIR /work
ENTRYPOINT ["mmrec"]
CMD ["--help"]

# What is built where no target is named.
FROM cpu
