#!/usr/bin/env bash
# Train on a Slurm cluster: one task per GPU. Options given to sbatch win over those below.
#
#   sbatch --partition P --nodes 2 launch/slurm.sh configs/20B_sft.py [section.key=value ...]
#
# tools/slurm.py writes a batch file that calls this one, with as many nodes as a config's layout needs.
# LOG_FOLDER (.) gets slurm-JOB/rank-N.log, one per rank. REPOSITORY: this repository, if sbatch is called elsewhere.
#
# Before the time limit every rank saves and stops, and the job is put back into the queue; it goes on from there. So it
# is when a rank fails, hangs or dies. A wrong config, full storage and diverged training end it. scancel JOB ends it for good.
# A node that stays away: scontrol update JobId=JOB NumNodes=1 NumTasks=8 goes on with fewer, where the layout allows it.
#SBATCH --job-name=internlm_lite
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -uo pipefail

say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:-}: $1" >&2; }

if [ $# -lt 1 ]; then
    say "found no config: say sbatch launch/slurm.sh CONFIG [section.key=value ...]"
    exit 2
fi
config=$1
shift

# Slurm runs a copy of this script from its spool folder, so the repository is the folder sbatch was called in.
repository=${REPOSITORY:-$SLURM_SUBMIT_DIR}
logs=${LOG_FOLDER:-.}/slurm-$SLURM_JOB_ID
[ -d "$repository/.venv/bin" ] && export PATH="$repository/.venv/bin:$PATH"

# One element of a job array: the plain number of its first one means all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}

# The batch shell alone is signalled before the time limit (B:), so it has to tell the ranks.
step='' limit='' last_moment=''
trap 'stop_in_time' USR1
trap '! runs_on || stop_in_time' TERM # also of --signal=B:TERM@N; scancel and preemption tell the ranks themselves

# Whether Slurm is not ending this job already: what it cancels is over, what it preempts it requeues by itself.
# shellcheck disable=SC2329 # called by the traps
runs_on() { scontrol show job "$job" 2>/dev/null | grep -q 'JobState=RUNNING'; }

# shellcheck disable=SC2329 # called by the traps
stop_in_time() {
    local end
    limit=1
    [ -z "$step" ] || kill -USR1 "$step"
    # After last_moment (seconds since the epoch) Slurm may cut off a save that takes long, and not requeue the job.
    end=$(squeue --noheader --job "$job" --format %e) && end=$(date --date "${end:-none}" +%s) && last_moment=$((end - 20))
}

# What is usually missing, asked on every node before torch is loaded.
mkdir -p "$logs"
# shellcheck disable=SC2016 # expanded on the nodes
if ! srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
    missing() { echo "node $SLURMD_NODENAME: found no $1: $2" >&2; exit 2; }
    [ -d "$1" ] || missing "folder $PWD/$1" "set LOG_FOLDER to a folder that all nodes share"
    [ -r "$2/train.py" ] || missing "train.py in $2" "call sbatch in the repository, or set REPOSITORY; all nodes must share it"
    [ -r "$3" ] || missing "config $3 in $PWD" "all nodes must see it"
    python -c "import importlib.util as u, sys; sys.exit(sys.version_info < (3, 10) or u.find_spec(\"torch\") is None)" ||
        missing "python 3.10 or newer with torch" "make venv in the repository, or activate an environment before sbatch"
' check "$logs" "$repository" "$config"; then
    say "not started, see above"
    exit 2
fi

# The environment of a job that goes on with fewer nodes still tells the tasks it was submitted with.
tasks=${SLURM_NTASKS:-}
most=$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-0}))
[ "$most" -gt 0 ] && [ "${tasks:-$most}" -ge "$most" ] && tasks=$most

# A requeued job goes on in the same logs: what this start says stands behind these sizes.
declare -A sizes=()
for log in "$logs"/rank-*.log; do [ ! -f "$log" ] || sizes[$log]=$(stat --format %s "$log"); done

# A dead rank ends the step at once instead of leaving the others to wait for their time-outs.
# srun does not take over --cpus-per-task from sbatch.
srun --kill-on-bad-exit=1 ${tasks:+--ntasks="$tasks"} --output="$logs/rank-%t.log" --open-mode=append \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    python "$repository/train.py" --launcher slurm --config "$config" "$@" &
step=$!
[ -z "$limit" ] || kill -USR1 "$step"
while kill -0 "$step" 2>/dev/null; do
    if [ "$(date +%s)" -ge "${last_moment:-9999999999}" ]; then
        say "still saving shortly before the time limit: requeued, to go on from the checkpoint before"
        scontrol requeue "$job" && sleep 60
    fi
    sleep 1 # in which a trapped signal waits
done
wait "$step"
code=$?

if [ "$code" = 0 ]; then
    say "done"
    exit 0
fi

new_part() { tail -c "+$((${sizes[$1]:-0} + 1))" "$1" 2>/dev/null; }
rank_0_said() { grep -qE "$1" <(new_part "$logs/rank-0.log"); }

# Of every rank the last line that begins with PATTERN, without what stands before it in either log style.
last_lines() {
    local log
    for log in "$logs"/rank-*.log; do
        new_part "$log" | LC_ALL=C sed -nE "s/^(.* ERROR [^ ]+ in [^ ]+ -- |ERROR [0-9:]+ )?($1.*)/\2/p" | tail -n 1
    done
}

# srun's code is the highest of all ranks', 128 and more where one was killed. The cause may be another one, and is
# named in the logs of ranks that failed because of it; where all failed alike, the first that speaks says why.
find_cause() {
    local cause causes
    cause=$(last_lines 'rank [0-9]+ on [^ ]+ failed first \(code [0-9]+\)' | tail -n 1)
    if [ -n "$cause" ]; then
        code=${cause#* failed first (code } && code=${code%%)*}
    elif [ "$code" != 3 ]; then
        causes=$(last_lines '(rank [0-9]+ on [^ ]+: )?[A-Za-z_.]+Error: ')
        # A wrong config may be wrong on one node alone, where nobody came from then.
        cause=$(grep ConfigError: <<<"$causes" | head -n 1)
        cause=${cause:-${causes%%$'\n'*}}
        case $cause in # ranks that never came, or come late, are killed when the others end
        *ConfigError:* | MeshError:*" was not started like rank 0 "*) code=2 ;;
        MeshError:*" ranks came to "* | MeshError:*" did not reach rank 0 "* | MeshError:*" was not called by "*) code=5 ;;
        esac
    fi
    [ -z "$cause" ] || say "$cause"
}

find_cause
why=''
case $code in
1) why="a rank failed" ;;
3) why="stopped" ;;
4) why="a rank hung" ;;
5) why="a rank was lost" ;;
*) [ "$code" -le 128 ] || why="a rank was killed" ;;
esac
if [ -z "$why" ]; then
    say "code $code: see $logs; not requeued"
elif ! runs_on; then
    say "code $code: $why, and Slurm ends the job"
elif [ "$code" = 3 ] && rank_0_said 'stopped by stop file'; then
    say "code 3: stopped by the stop file; not requeued"
elif [ "$code" = 3 ] && rank_0_said 'stopped by .*nothing saved'; then
    say "code 3: stopped, with nothing saved (ckpt.enable_save_ckpt=False); not requeued"
else
    # Failures are tried again, but not for ever: three in a row without a new checkpoint are enough.
    failures=$logs/failures
    if [ "$code" = 3 ] || [ -n "$limit" ] || rank_0_said 'saved [a-z]+ checkpoint'; then
        rm -f "$failures"
    else
        echo "$code" >>"$failures"
    fi
    if [ -f "$failures" ] && [ "$(wc -l <"$failures")" -ge 3 ]; then
        say "code $code: $why, for the third time; see $logs; not requeued"
    else
        say "code $code: $why; requeued"
        # Requeueing ends this script. An end of its own beside it could be taken for the job's.
        scontrol requeue "$job" && sleep 60
    fi
fi
exit "$code"
