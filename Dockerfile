# docker build -t gan-refine . && docker run --gpus=all -v "$PWD:/work" gan-refine refine --help
# For a CPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t gan-refine .
FROM python:3.12-slim

# An index that has torch; without one, the usual index, which has it with CUDA.
ARG TORCH_INDEX=""

# g++ builds the ops for the CPU. Those for a GPU are built at their first use, by NVRTC, which comes with torch.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 refine

WORKDIR /opt/gan-refine
COPY . .
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --no-deps -c constraints.txt --index-url="$TORCH_INDEX" torch; \
    fi \
    && pip install --no-cache-dir -c constraints.txt .

USER 1000
ENV REFINE_CACHE=/home/refine/.cache/gan-refine
RUN gan-refine ops build --device=cpu --portable

WORKDIR /work
ENTRYPOINT ["gan-refine"]
CMD ["--help"]
