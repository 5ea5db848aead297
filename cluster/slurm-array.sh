#!/usr/bin/env bash
# Collects one run in many independent SLURM jobs, without a Ray cluster:
#
#     sbatch --array=1-16 cluster/slurm-array.sh --out /shared/runs/olmoe --model … --data …
#
# All arguments are passed to `collector collect`. Each task starts its own Ray on its node and works on the same run
# directory, first on its part of the shards, then on the shards that others have left. So the run is completed even
# if tasks die or never start; the last one marks it complete. `--array=3` with PARTS=16 starts task 3 again.
# Tasks may share a node. Environment variables: VENV, HF_HOME, PARTS, MAX_RESTARTS.

#SBATCH --job-name=moe-routing
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail

: "${SLURM_ARRAY_TASK_ID:?submit this script with sbatch --array=1-N}"
parts="${PARTS:-$SLURM_ARRAY_TASK_COUNT}"
if ((SLURM_ARRAY_TASK_ID < 1 || SLURM_ARRAY_TASK_ID > parts)); then
    echo "slurm-array.sh: task $SLURM_ARRAY_TASK_ID of $parts: number the tasks --array=1-N, or set PARTS" >&2
    exit 2
fi

# SLURM runs a copy of this file, so the checkout is the folder in which the job was submitted.
export PATH="${VENV:-$SLURM_SUBMIT_DIR/.venv}/bin:$PATH"
export HF_HOME="${HF_HOME:-/tmp/hf-$USER}"
# A short path, as sockets need, and one per task: another user may own /tmp/ray.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
# The local Ray listens on the node's address, where other users' jobs run.
RAY_AUTH_TOKEN="$(head --bytes=32 /dev/urandom | od -An -vtx1 | tr -d ' \n')"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
unset RAY_ADDRESS # this job must not join another cluster

model=demo revision=
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --model) model="${arguments[i + 1]:-}" ;;
        --model=*) model="${arguments[i]#*=}" ;;
        --revision) revision="${arguments[i + 1]:-}" ;;
        --revision=*) revision="${arguments[i]#*=}" ;;
    esac
done
if [[ "$model" == */* && ! -d "$model" && -z "${HF_HUB_OFFLINE:-}" ]]; then
    # Once per node: if tasks share a node, the first downloads and the others wait for its lock.
    hf download "$model" ${revision:+--revision "$revision"} > /dev/null
fi

placement=()
if [[ -z "${SLURM_GPUS_ON_NODE:-}" ]]; then
    # Ray counts the cores of the node, not those of the job.
    placement=(--device cpu --replicas 1 --cpus-per-replica "$SLURM_CPUS_PER_TASK")
fi

collector collect --part "$SLURM_ARRAY_TASK_ID/$parts" "${placement[@]}" "$@" &
driver=$!

time_is_up=
trap 'time_is_up=yes; kill -TERM "$driver" 2> /dev/null || true' USR1
trap 'kill -TERM "$driver" 2> /dev/null || true' TERM INT

status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ends `wait`, not the driver
    status=0
    wait "$driver" || status=$?
done
rm -rf "$RAY_TMPDIR"

# Status 2 is unusable input, which another try does not change.
if [[ -n "$time_is_up" && "$status" -ne 0 && "$status" -ne 2 ]] && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-50})); then
    echo "slurm-array.sh: the time limit is near; requeued, the run resumes" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
