# docker build -t gan-refine . && docker run --gpus=all -v "$PWD:/work" gan-refine refine --help
# For a CPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t gan-refine .
FROM python:3.12-slim

ARG TORCH_INDEX=""

# g++ builds the ops for the CPU; nvcc for a GPU is not in this image, plain torch does the work there (docs/ops.md).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 refine

WORKDIR /opt/gan-refine
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url="$TORCH_INDEX"} .

USER 1000
ENV REFINE_CACHE=/home/refine/.cache/gan-refine
RUN gan-refine ops build

WORKDIR /work
ENTRYPOINT ["gan-refine"]
CMD ["--help"]
