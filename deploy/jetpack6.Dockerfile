# JetPack 6 (Jetson Linux 36.4: CUDA 12.6, cuDNN 9.3, TensorRT 10.3, Python 3.10) with edge-safe.
# Not built or run on a Jetson yet.
#
# Beside it lies a folder of wheels, made on any machine with a network:
#
#   edge-safe wheelhouse --platform jetpack-6 --extra gpu --extra audio --out deploy/wheels \
#       --extra-wheel onnxruntime_gpu-1.23.0-cp310-cp310-linux_aarch64.whl
#
#   docker build --file deploy/jetpack6.Dockerfile --tag edge-safe:jetpack6 deploy
#   docker run --rm --runtime nvidia --network none edge-safe:jetpack6 doctor
#
# https://catalog.ngc.nvidia.com/orgs/nvidia/containers/l4t-jetpack
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3-venv \
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
