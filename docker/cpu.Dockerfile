# Everything on the CPU: to try searchrl out, and to serve an index where there is no GPU.
#
#   docker build --file docker/cpu.Dockerfile --tag searchrl:cpu .
#   docker run --rm --volume "$PWD/workspace:/workspace" searchrl:cpu data worldfacts
#   docker run --rm --volume "$PWD/workspace:/workspace" searchrl:cpu train +experiment=smoke
#
# Not built yet, for want of a Docker daemon; its steps are `make setup`, which CI runs.
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3008 # archives keep no old versions; the base image's tag is the pin
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends build-essential libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/searchrl
# The large and slow part first: it changes only when a pin does.
COPY Makefile pyproject.toml ./
COPY requirements requirements
RUN make packages EXTRA=cpu VENV=/opt/venv
COPY . .
RUN make setup EXTRA=cpu VENV=/opt/venv

# Data, models, indexes and runs belong in a volume, not in the image.
WORKDIR /workspace
ENTRYPOINT ["searchrl"]
CMD ["--help"]
