#!/usr/bin/env bash
# Train on a Slurm cluster: one task per GPU. Options given to sbatch win over those below.
#
#   sbatch --partition P --nodes 2 launch/slurm.sh configs/20B_sft.py [section.key=value ...]
#
# Interactively the same is
#   srun -p P -N 2 -n 16 --ntasks-per-node=8 --gpus-per-task=1 python train.py --config configs/20B_sft.py
#SBATCH --job-name=internlm_lite
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "found no config: say sbatch launch/slurm.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
config=$1
shift

# Slurm runs a copy of this script from its spool folder, so the repository is the folder sbatch was called in.
cd "${REPOSITORY:-$SLURM_SUBMIT_DIR}"
if [ ! -f train.py ]; then
    echo "found no train.py in $PWD: submit from the repository, or set REPOSITORY" >&2
    exit 2
fi
[ -d .venv/bin ] && export PATH="$PWD/.venv/bin:$PATH"

# A dead rank ends the step at once instead of leaving the others to wait for their time-outs.
# srun does not take over --cpus-per-task from sbatch.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} python train.py --launcher slurm --config "$config" "$@"
