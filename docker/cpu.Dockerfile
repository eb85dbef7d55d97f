# The CPU image: tests, the demo, tokenising, reading reports.
#   docker build -f docker/cpu.Dockerfile -t internlm_lite:cpu .
#   docker run --rm -it internlm_lite:cpu make test
# On Linux x86 plain `torch` is the CUDA build, gigabytes of it. Where size matters:
#   --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU wheels)
FROM python:3.12-slim

ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
# Dependencies first: they are rebuilt only when pyproject.toml or the version changes, not with every edit.
COPY Makefile setup.py pyproject.toml README.md LICENSE ./
COPY internlm_lite/__init__.py internlm_lite/
RUN make venv TORCH="$TORCH"
COPY . .

# make compares TORCH with what the environment was built for, so it has to know it at run time as well.
ENV TORCH=$TORCH PATH=/workspace/.venv/bin:$PATH
CMD ["bash"]
