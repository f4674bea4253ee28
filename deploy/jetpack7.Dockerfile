# JetPack 7.2 (Jetson Linux 39.2: CUDA 13.2, cuDNN 9.20, TensorRT 10.16, Python 3.12) and edge-safe.
# Not built or run on a Jetson yet.
#
# Beside it lies a folder of wheels, made on any machine with a network; docs/jetson.md says where
# the onnxruntime-gpu for it comes from:
#
#   edge-safe wheelhouse --platform jetpack-7 --extra gpu --extra audio --out deploy/wheels \
#       --extra-wheel onnxruntime_gpu-1.28.0-cp312-cp312-linux_aarch64.whl
#
#   docker build --file deploy/jetpack7.Dockerfile --tag edge-safe:jetpack7 deploy
#   docker run --rm --runtime nvidia --network none edge-safe:jetpack7 doctor
FROM ubuntu:24.04

# Release of NVIDIA's packages for Jetson: r39.2 is JetPack 7.2.
ARG JETSON_LINUX=r39.2

ADD https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /etc/apt/keyrings/jetson.asc
RUN chmod 644 /etc/apt/keyrings/jetson.asc \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates python3-venv \
    && for part in common som; do \
        echo "deb [signed-by=/etc/apt/keyrings/jetson.asc] \
https://repo.download.nvidia.com/jetson/$part $JETSON_LINUX main"; \
    done > /etc/apt/sources.list.d/jetson.list \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        cuda-cudart-13-2 cuda-nvrtc-13-2 libcublas-13-2 libcufft-13-2 libcurand-13-2 \
        libcudnn9-cuda-13 tensorrt-libs \
    && rm -rf /var/lib/apt/lists/*

RUN --mount=type=bind,source=wheels,target=/wheels \
    python3 -m venv /opt/edge-safe \
    && /opt/edge-safe/bin/python -m pip install --no-cache-dir --no-index --find-links /wheels \
        --require-hashes --requirement /wheels/requirements.txt

# The GPU's device files belong to the group video.
RUN useradd --create-home --uid 10001 --groups video edge-safe
USER edge-safe
ENV PATH=/opt/edge-safe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    EDGE_SAFE_CACHE=/home/edge-safe/cache
# Engines are built once and kept here.
VOLUME /home/edge-safe/cache
ENTRYPOINT ["edge-safe"]
CMD ["doctor"]
