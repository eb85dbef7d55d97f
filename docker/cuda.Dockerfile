# The GPU image: training on one node or many.
#   docker build -f docker/cuda.Dockerfile -t internlm_lite:cuda .
#   docker run --rm -it --gpus all --ipc host --ulimit memlock=-1 internlm_lite:cuda \
#       torchrun --nproc_per_node=8 train.py --config configs/7B_sft.py
# Several nodes: add --network host, and --device /dev/infiniband where there is InfiniBand; tools/doctor.py looks at it.
#
# torch's wheel brings its own CUDA libraries and NCCL, so the small `base` image does; it has to fit the driver. The
# flash-attn package is built, half an hour, with what is in `devel`; without it torch's own varlen attention is used:
#   --build-arg FLASH=1 --build-arg CUDA=13.0.2-devel-ubuntu24.04
ARG CUDA=13.0.2-base-ubuntu24.04
FROM nvidia/cuda:$CUDA

ARG TORCH=torch==2.13.0
ARG FLASH=0
ENV DEBIAN_FRONTEND=noninteractive
# g++ is for triton's kernels; without the verbs libraries NCCL goes over TCP instead of InfiniBand, and says nothing.
RUN apt-get update && apt-get install --yes --no-install-recommends make git python3 python3-venv python3-dev g++ ninja-build \
    libibverbs1 ibverbs-providers librdmacm1 && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
# Dependencies first: they are rebuilt only when pyproject.toml or the version changes, not with every edit.
COPY Makefile setup.py pyproject.toml README.md LICENSE ./
COPY internlm_lite/__init__.py internlm_lite/
RUN make venv TORCH="$TORCH"
RUN if [ "$FLASH" = 1 ]; then \
        .venv/bin/pip install wheel && \
        .venv/bin/pip install --no-build-isolation --constraint .venv/torch.txt --editable '.[flash]'; \
    fi
COPY . .

# make compares TORCH with what the environment was built for, so it has to know it at run time as well.
ENV TORCH=$TORCH PATH=/workspace/.venv/bin:$PATH
CMD ["bash"]
