#!/usr/bin/env bash
# Train with torchrun on several machines: the same command on each of them, within ten minutes.
#
#   MEET=node0 NNODES=2 launch/torchrun_nodes.sh configs/20B_sft.py [section.key=value ...]
#
# MEET: one of the machines, by a name or address that all of them know. NNODES=2:4 starts with four or, if the others do
# not come, with two; after RESTARTS=n failures at most, the machines that are left go on from the last checkpoint, where
# the layout allows their number. PORT (29500): free on MEET, and open to the others. NPROC: processes of each machine.
# NETWORK: the interface to use, such as eth0, where a machine has several. A machine that loses the network ends its
# processes; its torchrun may look for MEET for many more minutes then, and can be killed.
set -euo pipefail

missing() {
    echo "found no $1: say MEET=node0 NNODES=2 launch/torchrun_nodes.sh CONFIG [section.key=value ...]" >&2
    exit 2
}

[ $# -ge 1 ] || missing config
[ -n "${MEET:-}" ] || missing "MEET, one of the machines, which the others can reach"
[ -n "${NNODES:-}" ] || missing "NNODES, how many machines"
getent ahosts "$MEET" >/dev/null || missing "address of MEET=$MEET"
config=$1
shift

# The config and what the run writes are looked for where this was called.
repository=$(realpath "$(dirname "$0")/..")
[ -d "$repository/.venv/bin" ] && export PATH="$repository/.venv/bin:$PATH"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)

# Rank 0 serves the ranks' store: a machine that comes back could not join one that an agent serves.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Ranks that are told to stop save first, which may take longer than the 30 s that torchrun waits by itself.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
if [ -n "${NETWORK:-}" ]; then
    export NCCL_SOCKET_IFNAME=$NETWORK GLOO_SOCKET_IFNAME=$NETWORK
fi

# c10d's rendezvous hands out the ranks, so that no machine has to be told its number.
exec torchrun --nnodes "$NNODES" --nproc_per_node "${NPROC:-$((gpus > 0 ? gpus : 1))}" --max_restarts "${RESTARTS:-0}" \
    --rdzv_backend c10d --rdzv_endpoint "$MEET:${PORT:-29500}" --rdzv_id internlm_lite --rdzv_conf join_timeout=600 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$repository/train.py" --launcher torch --config "$config" "$@"
