# Image with the training commands. On GPUs the host needs only the driver and the NVIDIA container toolkit; torch's wheel
# contains the CUDA libraries. The same image runs on a CPU.
#
#   docker build -t moco .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/workspace/runs" moco experiment=NAME
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/workspace/runs" --entrypoint torchrun moco \
#       --standalone --nproc-per-node gpu -m moco.train experiment=NAME
#
# --ipc host: loader workers and NCCL pass data through shared memory; a container has only 64 MB of it by default.
# The container's user has id 1000: before the first run, create runs/ on the host and make it writable for that id.
FROM python:3.12-slim

# torch.compile needs a C++ compiler, and Triton a C compiler for the kernels on GPUs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Install the dependencies first, so that a code change does not download torch again.
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY moco/__init__.py moco/
COPY configs/__init__.py configs/
RUN pip install --no-cache-dir '.[onnx,parquet]'
COPY moco moco
COPY configs configs
RUN rm -rf build && pip install --no-cache-dir --no-deps --force-reinstall .

# torch.compile names its cache after the user; with `docker run --user ID` the user may not be in /etc/passwd.
ENV PYTHONUNBUFFERED=1 \
    USER=moco \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 moco && install -d -o moco -g moco /workspace /workspace/runs
USER moco
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "moco.train"]
