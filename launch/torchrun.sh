#!/usr/bin/env bash
# Train with torchrun on one machine. Several: launch/torchrun_nodes.sh.
#
#   launch/torchrun.sh configs/7B_sft.py [section.key=value ...]     all its GPUs
#   NPROC=2 launch/torchrun.sh configs/demo.py                       two processes, also without a GPU
#
# RESTARTS=n starts all processes again after a failure, up to n times; they go on from the last checkpoint.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "found no config: say launch/torchrun.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
config=$1
shift

# The config and what the run writes are looked for where this was called.
repository=$(realpath "$(dirname "$0")/..")
[ -d "$repository/.venv/bin" ] && export PATH="$repository/.venv/bin:$PATH"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)

# Ranks that are told to stop save first, which may take longer than the 30 s that torchrun waits by itself.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec torchrun --standalone --nproc_per_node "${NPROC:-$((gpus > 0 ? gpus : 1))}" --max_restarts "${RESTARTS:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$repository/train.py" --launcher torch --config "$config" "$@"
