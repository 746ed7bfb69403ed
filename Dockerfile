# The image of the training commands. On GPUs it needs only the driver and the NVIDIA container toolkit on the host:
# torch's wheel brings the CUDA libraries. The same image runs on a CPU.
#
#   docker build -t moco .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/workspace/runs" moco experiment=NAME
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/workspace/runs" --entrypoint torchrun moco \
#       --standalone --nproc-per-node gpu -m moco.train experiment=NAME
#
# --ipc host: loader workers and NCCL pass data through shared memory, of which a container has 64 MB by default.
# The container's user has id 1000: create runs/ on the host before the first run, writable for that id.
FROM python:3.12-slim

# torch.compile builds its kernels with a C++ compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first, from the project's own list, so that a change of the code does not download torch again.
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY moco/__init__.py moco/
COPY configs/__init__.py configs/
RUN pip install --no-cache-dir .
COPY moco moco
COPY configs configs
RUN rm -rf build && pip install --no-cache-dir --no-deps --force-reinstall .

# USER is set for `docker run --user ID`: torch.compile names its cache after the user, whom /etc/passwd may not know.
ENV PYTHONUNBUFFERED=1 \
    USER=moco \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 moco && install -d -o moco -g moco /workspace /workspace/runs
USER moco
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "moco.train"]
