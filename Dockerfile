# An image with Meshloom and torch for CUDA; for a host without GPUs: --build-arg BASE=python:3.12-slim and the CPU index.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH=2.11.*

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PATH=/opt/meshloom/bin:$PATH
# Ubuntu's base has no Python; the slim images of Python have theirs
RUN command -v python3 >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/meshloom && python -m pip install "torch==${TORCH}" --index-url "${TORCH_INDEX}"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip install ".[data]"

# runs and caches lie on the host; the user of the host owns them
WORKDIR /work
ENV MESHLOOM_CACHE_DIR=/cache/meshloom HF_HOME=/cache/huggingface HOME=/tmp
ENTRYPOINT ["meshloom"]
CMD ["doctor"]
