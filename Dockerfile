# Three images. The default stage builds on NVIDIA's NeMo container, which carries PyTorch, Transformer Engine, Apex and
# Megatron-Core; none of these is replaced:   docker build -t megatron-tropd .
# nvcr.io/nvidia/pytorch:26.06-py3 to 26.09-py3 (torch and TE, no core) serve as well, then Megatron-Core is added:
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch:26.06-py3 -t megatron-tropd .
# The `cpu` stage is the laptop's set-up:     docker build --target cpu -t megatron-tropd:cpu .
# The `test` stage runs the test suite in it: docker build --target test .
# CUDA 13 images want a driver of 580 or newer. No image is built in CI; the commands are those of `make setup`.
ARG BASE=nvcr.io/nvidia/nemo:26.08

FROM python:3.12-slim-bookworm AS cpu
# The tag above fixes the distribution; its packages' versions move with its security updates.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends make git gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron-tropd
COPY . .
RUN make setup
ENV PATH=/opt/megatron-tropd/.venv/bin:$PATH
CMD ["python", "-m", "megatron_tropd", "--help"]

FROM cpu AS test
RUN make lint types test

FROM ${BASE} AS gpu
WORKDIR /opt/megatron-tropd
COPY . .
# The new venv sees what the image has (NeMo's own venv included), and pip is held to the image's versions of torch,
# triton, numpy, Transformer Engine and Megatron-Core; the last is installed only where the image has none.
RUN make setup
ENV PATH=/opt/megatron-tropd/.venv/bin:$PATH
# Fails the build where PyTorch, Megatron-Core or this package does not import, or Transformer Engine or Apex although the
# image has it; says what is there.
RUN python tools/check_image.py && python -m megatron_tropd train --help >/dev/null
CMD ["python", "-m", "megatron_tropd", "--help"]
