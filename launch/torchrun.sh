#!/usr/bin/env bash
# Train with torchrun, on one machine or on several.
#
#   launch/torchrun.sh configs/7B_sft.py [section.key=value ...]                 one machine, all its GPUs
#   NPROC=2 launch/torchrun.sh configs/demo.py                                   two processes, also without a GPU
#   NNODES=2 NODE_RANK=0 MASTER=node0 launch/torchrun.sh configs/20B_sft.py      on node0, and the same with
#   NNODES=2 NODE_RANK=1 MASTER=node0 launch/torchrun.sh configs/20B_sft.py      NODE_RANK=1 on the other
#
# RESTARTS=n starts all processes again after a failure, up to n times; they go on from the last checkpoint.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "found no config: say launch/torchrun.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
config=$1
shift

cd "$(dirname "$0")/.."
[ -d .venv/bin ] && export PATH="$PWD/.venv/bin:$PATH"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
nnodes=${NNODES:-1}
if [ "$nnodes" -gt 1 ]; then
    rendezvous=(--nnodes "$nnodes" --node_rank "${NODE_RANK:?of this machine, 0 to NNODES-1}"
        --master_addr "${MASTER:?host name of node 0}" --master_port "${PORT:-29500}")
else
    rendezvous=(--standalone)
fi

# Restarted gloo workers must not meet the addresses of the dead ones in the launcher's store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# One OpenMP thread per process unless told otherwise: ranks share the machine's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --nproc_per_node "$nproc" --max_restarts "${RESTARTS:-0}" "${rendezvous[@]}" \
    train.py --launcher torch --config "$config" "$@"
